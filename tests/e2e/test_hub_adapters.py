"""Adapters that come from the Hub when a request names them, as in LoRAX."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamic_lora_server.intake.sources import SourceUnavailable
from tests.support.adapters import edit_config, make_adapter
from tests.support.http_server import listening, tiny_app, tiny_config
from tests.support.hub import FakeHub, fake_hub
from tests.support.models import tiny_llama

ID = "predibase/Customer_Support"
OTHER = "predibase/tone"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    with pytest.MonkeyPatch.context() as patch:
        hub = fake_hub(patch)
        folder = tmp_path_factory.mktemp("hub")
        for seed, name in enumerate((ID, OTHER, "stranger/x", "predibase/broken")):
            hub.repositories[name] = make_adapter(folder / str(seed), tiny_llama(), seed=seed)
        edit_config(hub.repositories["predibase/broken"], r=0)
        hub.repositories["predibase/model"] = folder / "model"
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        yield hub


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[httpx.Client]:
    with (
        listening(tiny_app(tiny_config(folder, **options))) as address,
        httpx.Client(base_url=address, timeout=60) as http,
    ):
        yield http


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[httpx.Client]:
    with serving(home, fetch_from_hub=("Predibase",)) as http:
        yield http


@pytest.fixture
def http(server: httpx.Client, hub: FakeHub) -> httpx.Client:
    """A server without adapters, and a Hub that nobody has asked yet."""
    for adapter in server.get("/adapters").json()["adapters"]:
        server.delete(f"/adapters/{adapter['name']}")
    hub.asked.clear()
    hub.failure = None
    return server


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server that fetches nothing."""
    with serving(tmp_path_factory.mktemp("closed")) as http:
        yield http


def ask(http: httpx.Client, adapter: str | None = None, **parameters: Any) -> httpx.Response:
    named = {} if adapter is None else {"adapter_id": adapter}
    parameters = {"max_new_tokens": 2, **named, **parameters}
    return http.post("/generate", json={"inputs": "the king", "parameters": parameters})


def names(http: httpx.Client) -> list[str]:
    return [adapter["name"] for adapter in http.get("/adapters").json()["adapters"]]


@pytest.mark.parametrize("source", [{"adapter_source": "hub"}, {"adapter_source": None}, {}])
def test_the_first_request_brings_an_adapter_to_stay(
    http: httpx.Client, hub: FakeHub, source: dict[str, Any]
) -> None:
    for _ in range(2):
        answer = ask(http, ID, **source)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-adapter"] == ID
    assert hub.asked == [ID]
    assert names(http) == [ID]
    version = http.get(f"/adapters/{ID}").json()["version"]
    assert answer.headers["x-adapter-version"] == version
    pinned = ask(http, f"{ID}@{version[:8]}*0.5", **source)
    assert pinned.headers["x-adapter"] == f"{ID}@{version[:8]}*0.5"
    assert http.delete(f"/adapters/{ID}").status_code == 204
    assert ask(http, ID, **source).status_code == 200
    assert hub.asked == [ID, ID]


def test_sums_bring_all_their_adapters(http: httpx.Client, hub: FakeHub) -> None:
    both = {"ids": [ID, OTHER], "weights": [0.5, 0.5]}
    answer = ask(http, merged_adapters=both, adapter_source="hub")
    assert answer.headers["x-adapter"] == f"{ID}*0.5+{OTHER}*0.5"
    assert hub.asked == [ID, OTHER]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": ID, "prompt": "the king", "max_tokens": 2}),
        ("/v1/completions", {"model": f"{ID}*2", "prompt": ["the", "king"], "max_tokens": 2}),
        ("/v1/completions", {"model": ID, "prompt": "the", "max_tokens": 2, "stream": True}),
        (
            "/v1/chat/completions",
            {"model": ID, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
        ),
        ("/generate_stream?adapter=predibase/Customer_Support", {"inputs": "the king"}),
        ("/tokenize", {"model": ID, "prompt": "the king"}),
        ("/tokenize", {"model": ID, "messages": [{"role": "user", "content": "hi"}]}),
        ("/detokenize", {"model": ID, "tokens": [1]}),
    ],
)
def test_so_does_one_of_each_route(
    http: httpx.Client, hub: FakeHub, path: str, body: dict[str, Any]
) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert hub.asked == [ID]
    assert names(http) == [ID]


def test_the_base_and_adapters_that_are_here_need_no_hub(
    http: httpx.Client, closed: httpx.Client, hub: FakeHub
) -> None:
    for one in (http, closed):
        assert ask(one, adapter_source="hub").headers["x-adapter"] == "base"
        assert ask(one, "base", adapter_source="hub").headers["x-adapter"] == "base"
    files = [("files", (p.name, p.read_bytes())) for p in hub.repositories[ID].iterdir()]
    for name in (ID, "ner"):
        assert closed.post("/adapters", data={"name": name}, files=files).status_code == 201
        assert ask(closed, name, adapter_source="hub").headers["x-adapter"] == name
        assert closed.delete(f"/adapters/{name}").status_code == 204
    assert hub.asked == []


def test_nothing_is_fetched_without_the_option(closed: httpx.Client, hub: FakeHub) -> None:
    hub.asked.clear()
    refused = ask(closed, ID, adapter_source="hub")
    problem = refused.json()
    assert (refused.status_code, problem["field"]) == (422, "parameters.adapter_source")
    assert "--fetch-from-hub" in problem["detail"]
    for unknown in (ask(closed, ID), ask(closed, "ner")):
        assert unknown.json()["type"] == "/problems/adapter-not-found"
    model = closed.post("/v1/completions", json={"model": ID, "prompt": "x"})
    assert (model.status_code, model.json()["error"]["code"]) == (404, "model_not_found")
    assert hub.asked == []


def test_nothing_is_fetched_of_others(http: httpx.Client, hub: FakeHub) -> None:
    refused = ask(http, "stranger/x", adapter_source="hub")
    assert refused.status_code == 422
    assert "fetches nothing of 'stranger'" in refused.json()["detail"]
    assert ask(http, "stranger/x").status_code == 404
    assert ask(http, "ner", adapter_source="hub").status_code == 422
    assert hub.asked == []


def test_what_the_hub_does_not_have(http: httpx.Client, hub: FakeHub) -> None:
    answer = ask(http, "predibase/nix", adapter_source="hub")
    problem = answer.json()
    assert (answer.status_code, problem["type"]) == (404, "/problems/adapter-not-found")
    assert "the Hub has no such repository" in problem["detail"]
    assert "HF_TOKEN" in problem["fix"]
    model = http.post("/v1/completions", json={"model": "predibase/nix", "prompt": "x"})
    assert (model.status_code, model.json()["error"]["code"]) == (404, "model_not_found")
    assert model.json()["error"]["param"] == "model"
    assert hub.asked == ["predibase/nix"] * 2


def test_a_hub_that_is_away(http: httpx.Client, hub: FakeHub) -> None:
    hub.failure = SourceUnavailable("away")
    answer = ask(http, ID)
    assert (answer.status_code, answer.json()["field"]) == (502, "adapter")
    hub.failure = None
    assert ask(http, ID).status_code == 200


def test_what_cannot_be_served_leaves_nothing(http: httpx.Client, home: Path) -> None:
    for name, text in (("broken", "r must be"), ("model", "adapter_config.json")):
        problem = ask(http, f"predibase/{name}").json()
        assert (problem["status"], problem["type"]) == (422, "/problems/invalid-adapter")
        assert text in problem["detail"]
    assert names(http) == []
    for folder in ("adapters", "staging"):
        assert list((home / "home" / folder).iterdir()) == []


@pytest.mark.parametrize("source", ["local", "s3", "pbase"])
def test_other_sources_are_refused_with_what_to_do(http: httpx.Client, source: str) -> None:
    answer = ask(http, ID, adapter_source=source)
    problem = answer.json()
    assert (answer.status_code, problem["field"]) == (422, "parameters.adapter_source")
    assert f"{source!r} is not supported by this server" in problem["detail"]
    assert "POST /adapters" in problem["detail"]
    assert ask(http, ID, adapter_source="nix").status_code == 422


def test_who_leaves_early_ends_no_fetch_and_leaves_nothing(
    http: httpx.Client, hub: FakeHub, home: Path
) -> None:
    answers: list[int] = []
    hub.gate.clear()
    staying = [
        threading.Thread(target=lambda: answers.append(ask(http, ID).status_code)) for _ in range(3)
    ]
    for thread in staying:
        thread.start()
    body = {"inputs": "x", "parameters": {"adapter_id": ID}}
    with pytest.raises(httpx.ReadTimeout):
        http.post("/generate", json=body, timeout=0.1)
    assert ask(http).status_code == 200  # others go on meanwhile
    hub.gate.set()
    for thread in staying:
        thread.join()
    assert answers == [200, 200, 200]
    assert hub.asked == [ID]
    assert list((home / "home" / "staging").iterdir()) == []


async def test_a_server_that_ends_tells_who_waits(tmp_path: Path, hub: FakeHub) -> None:
    hub.asked.clear()
    hub.gate.clear()
    app = tiny_app(tiny_config(tmp_path, fetch_from_hub=("*",)))
    transport = httpx.ASGITransport(app)
    try:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://server") as http,
        ):
            while (await http.get("/ready")).status_code != 200:
                await asyncio.sleep(0.05)
            body = {"inputs": "x", "parameters": {"adapter_id": ID}}
            asked = asyncio.create_task(http.post("/generate", json=body))
            while not hub.asked:
                await asyncio.sleep(0.01)
            await app.state.server.end_generations()
            answer = await asked
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert "shutting down" in answer.json()["detail"]
    finally:
        hub.gate.set()
