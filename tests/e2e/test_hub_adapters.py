"""Adapters that come from the Hub when a request names them, as in LoRAX."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamic_lora_adapters import Passport, Publication
from dynamic_lora_server import state
from dynamic_lora_server.intake import hub_room
from dynamic_lora_server.intake.publishing import publish_source
from dynamic_lora_server.intake.sources import SourceUnavailable
from tests.support.adapters import edit_config, make_adapter
from tests.support.eventually import wait_until
from tests.support.http_server import listening, tiny_app, tiny_config
from tests.support.hub import FakeHub, fake_hub
from tests.support.models import tiny_llama
from tests.support.uploads import WEIGHTS_FILE

ID = "predibase/Customer_Support"
OTHER = "predibase/tone"
THIRD = "predibase/names"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    with pytest.MonkeyPatch.context() as patch:
        hub = fake_hub(patch)
        folder = tmp_path_factory.mktemp("hub")
        for seed, name in enumerate((ID, OTHER, "stranger/x", THIRD, "predibase/broken")):
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


def test_a_composition_that_is_saved_brings_its_adapters(
    http: httpx.Client, closed: httpx.Client, hub: FakeHub
) -> None:
    blend = {"adapter": f"{ID}*0.5+{OTHER}*0.5"}
    for taken in ("base", "Bad Name"):
        assert http.put(f"/compositions/{taken}", json=blend).status_code == 422
    assert hub.asked == []
    saved = http.put("/compositions/blend", json=blend)
    assert saved.status_code == 201, saved.text
    assert hub.asked == [ID, OTHER]
    assert names(http) == [ID, OTHER]
    http.delete(f"/adapters/{OTHER}")
    assert http.get("/compositions/blend").json()["version"] is None
    assert ask(http, "blend").status_code == 200
    assert hub.asked == [ID, OTHER, OTHER]
    assert http.delete("/compositions/blend").status_code == 204
    missing = http.put("/compositions/blend", json={"adapter": "predibase/gone*0.5"})
    assert (missing.status_code, missing.json()["type"]) == (404, "/problems/adapter-not-found")
    assert "the Hub has no such repository" in missing.json()["detail"]
    hub.asked.clear()
    unknown = closed.put("/compositions/blend", json=blend)
    assert (unknown.status_code, unknown.json()["type"]) == (404, "/problems/adapter-not-found")
    assert hub.asked == []


def test_what_only_shows_or_deletes_fetches_nothing(http: httpx.Client, hub: FakeHub) -> None:
    for answer in (
        http.get(f"/adapters/{ID}"),
        http.delete(f"/adapters/{ID}"),
        http.get(f"/v1/models/{ID}"),
        http.post("/v1/unload_lora_adapter", json={"lora_name": ID}),
    ):
        assert answer.status_code == 404
    assert hub.asked == []


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
    assert "asks the Hub again in" in model.json()["error"]["message"]
    assert hub.asked == ["predibase/nix"]


def test_a_hub_that_is_away_is_left_alone_for_a_while(http: httpx.Client, hub: FakeHub) -> None:
    hub.failure = SourceUnavailable("away")
    answer = ask(http, "predibase/away")
    assert (answer.status_code, answer.json()["field"]) == (502, "adapter")
    assert answer.headers["retry-after"] == "5"
    assert "asks the Hub again in 5 s" in answer.json()["fix"]
    assert hub.asked == ["predibase/away"]
    hub.failure = None
    assert ask(http, ID).status_code == 200


def test_what_cannot_be_served_leaves_nothing(http: httpx.Client, hub: FakeHub, home: Path) -> None:
    wrong = [("broken", "r must be"), ("model", "adapter_config.json")]
    for name, text in wrong * 2:
        problem = ask(http, f"predibase/{name}").json()
        assert (problem["status"], problem["type"]) == (422, "/problems/invalid-adapter")
        assert text in problem["detail"]
    assert hub.asked == ["predibase/broken", "predibase/model"]
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


@pytest.fixture
def full(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """A server with room for two adapters of the Hub, of which a request's use is over at once."""
    monkeypatch.setattr(hub_room, "_IN_USE_SECONDS", -1.0)
    size = (hub.repositories[ID] / WEIGHTS_FILE).stat().st_size
    caps = {"max_upload_bytes": 2 * size, "max_hub_bytes": 5 * size // 2}
    with serving(tmp_path, fetch_from_hub=("*",), **caps) as http:
        hub.asked.clear()
        hub.failure = None
        yield http


def upload(http: httpx.Client, name: str, folder: Path) -> httpx.Response:
    kept = [folder / "adapter_config.json", folder / WEIGHTS_FILE]
    files = [("files", (path.name, path.read_bytes())) for path in kept]
    return http.post("/adapters", data={"name": name}, files=files)


def test_the_least_recently_used_make_room(full: httpx.Client, hub: FakeHub) -> None:
    assert upload(full, "mine", hub.repositories[ID]).status_code == 201
    for adapter in (OTHER, THIRD, OTHER, "stranger/x"):
        assert ask(full, adapter).status_code == 200
    assert names(full) == ["mine", OTHER, "stranger/x"]
    assert full.get(f"/adapters/{OTHER}").json()["fetched"] is True
    assert full.get("/adapters/mine").json()["fetched"] is False
    assert full.put("/compositions/kept", json={"adapter": f"{OTHER}*0.5"}).status_code == 201
    assert ask(full, "stranger/x").status_code == 200
    assert ask(full, THIRD).status_code == 200
    assert names(full) == ["mine", THIRD, OTHER]
    # What somebody uploads is theirs, as is what has the same content.
    assert upload(full, THIRD, hub.repositories[THIRD]).status_code == 200
    assert full.get(f"/adapters/{THIRD}").json()["fetched"] is False
    assert ask(full, ID).status_code == 200
    assert ask(full, "stranger/x").status_code == 200
    assert names(full) == ["mine", ID, THIRD, OTHER, "stranger/x"]


def test_of_two_that_are_too_much_together_one_stays(
    full: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_room, "_IN_USE_SECONDS", 60.0)
    assert ask(full, OTHER).status_code == 200
    published = asyncio.Barrier(2)
    looked, look = threading.Barrier(2), hub_room._by_use

    async def publish_both(*args: Any, **options: Any) -> Publication:
        publication = await publish_source(*args, **options)
        await published.wait()
        return publication

    def look_both_if_they_can(fetched: list[Passport], *args: Any) -> list[Passport]:
        if len(fetched) == 2:  # not before they are fetched
            with suppress(threading.BrokenBarrierError):
                looked.wait(1)
        return look(fetched, *args)

    monkeypatch.setattr(state, "publish_source", publish_both)
    monkeypatch.setattr(hub_room, "_by_use", look_both_if_they_can)
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(ask, full, name) for name in (THIRD, "stranger/x")]
        assert sorted(answer.result().status_code for answer in answers) == [200, 507]
    assert len(names(full)) == 2


def test_what_is_uploaded_while_it_is_fetched_makes_no_room(
    full: httpx.Client, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Passport | None] = []

    def make_room(*_: object, newest: Passport | None) -> list[str]:
        made.append(newest)
        return []

    monkeypatch.setattr(state, "make_room", make_room)
    hub.gate.clear()
    with ThreadPoolExecutor() as pool:
        try:
            answer = pool.submit(ask, full, ID)
            wait_until(lambda: hub.asked == [ID], "it is asked for")
            assert upload(full, ID, hub.repositories[OTHER]).status_code == 201
        finally:
            hub.gate.set()
        assert answer.result().status_code == 200
    assert made == [None]  # before it was fetched
    assert full.get(f"/adapters/{ID}").json()["fetched"] is False


def test_where_all_are_in_use_no_other_comes(
    full: httpx.Client, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_room, "_IN_USE_SECONDS", 60.0)
    for adapter in (OTHER, THIRD):
        assert ask(full, adapter).status_code == 200
    refused = ask(full, "stranger/x")
    assert (refused.status_code, refused.json()["type"]) == (507, "/problems/store-failed")
    assert "--max-hub-bytes" in refused.json()["fix"]
    assert names(full) == [THIRD, OTHER]
    assert ask(full, "stranger/x").status_code == 507
    assert hub.asked == [OTHER, THIRD, "stranger/x"]
    assert ask(full, OTHER).status_code == 200
