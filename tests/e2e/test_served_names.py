"""The base model under other names than its own."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamic_lora_server import runtime as module
from dynamic_lora_server.base.base_model import BaseModel, resolve_base
from dynamic_lora_server.errors import InvalidParameter
from tests.support.adapters import make_adapter
from tests.support.http_server import listening, tiny_app, tiny_config
from tests.support.models import tiny_llama
from tests.support.runtimes import load_runtime, publish, serving

NAMES = ("House/Model", "house")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"), tiny_llama(), rank=4)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, adapter: Path) -> Iterator[httpx.Client]:
    config = tiny_config(
        tmp_path_factory.mktemp("server"),
        served_model_names=NAMES,
        adapter_roots=(adapter.parent,),
    )
    with (
        listening(tiny_app(config)) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        source = {"name": "ner", "source": str(adapter)}
        assert client.post("/adapters", json=source).status_code == 201
        yield client


def models(client: httpx.Client) -> dict[str, Any]:
    return {one["id"]: one for one in client.get("/v1/models").json()["data"]}


def test_lists_have_the_names(client: httpx.Client) -> None:
    real = client.get("/info").json()["model_id"]
    found = models(client)
    assert list(found) == [*NAMES, "ner"]
    for name in NAMES:
        assert (found[name]["root"], found[name]["parent"]) == (real, None)
        assert client.get(f"/v1/models/{name}").json() == found[name]
    assert found["ner"]["parent"] == NAMES[0]
    for name in ("base", real):
        assert client.get(f"/v1/models/{name}").json() == found[NAMES[0]]


@pytest.mark.parametrize("name", [*NAMES, "base", "ner*0", None])
@pytest.mark.parametrize("chats", [False, True])
def test_answers_have_the_first(client: httpx.Client, name: str | None, chats: bool) -> None:
    model = name or client.get("/info").json()["model_id"]
    path = "/v1/chat/completions" if chats else "/v1/completions"
    text = {"messages": [{"role": "user", "content": "hi"}]} if chats else {"prompt": "hi"}
    body = {"model": model, "max_tokens": 2, **text}
    assert client.post(path, json=body).json()["model"] == NAMES[0]
    streamed = client.post(path, json={**body, "stream": True}).text
    assert f'"model":"{NAMES[0]}"' in streamed
    assert client.post(path, json={**body, "model": "ner"}).json()["model"] == "ner"


def test_the_native_route_takes_them_too(client: httpx.Client) -> None:
    answer = client.post("/generate", params={"adapter": NAMES[0]}, json={"inputs": "hi"})
    assert answer.headers["x-adapter"] == "base"


def test_nothing_else_gets_one(client: httpx.Client, adapter: Path) -> None:
    uploaded = client.post("/adapters", json={"name": "house", "source": str(adapter)})
    saved = client.put("/compositions/house", json={"adapter": "ner*0.5"})
    for answer in (uploaded, saved):
        assert answer.status_code == 422
        assert answer.json()["type"] == "/problems/invalid-adapter-name"
        assert "'house' means the base model" in answer.json()["detail"]


async def test_names_that_something_has_are_refused_at_the_start(
    tmp_path: Path, adapter: Path
) -> None:
    async with serving(tmp_path) as runtime:
        publish(runtime, "ner", adapter)
        publish(runtime, "org/Tone", adapter)
        saved = runtime.saved
        saved.save("newsy", saved.resolve("ner*0.5").parts)
    taken = (("ner", "ner"), ("NER", "ner"), ("newsy", "newsy"), ("org/tone", "org/Tone"))
    for name, other in taken:
        with pytest.raises(InvalidParameter, match=f"{name!r}, but {other!r} is") as caught:
            load_runtime(tmp_path, served_model_names=("house", name))
        assert caught.value.field == "served_model_names"


async def test_an_id_that_an_adapter_has_is_refused_at_the_start(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was free while the same base was served from a folder."""
    async with serving(tmp_path) as runtime:
        publish(runtime, "org/Base", adapter)

    def from_the_hub(model: str | None) -> BaseModel:
        return replace(resolve_base(model), name="org/base")

    monkeypatch.setattr(module, "resolve_base", from_the_hub)
    with pytest.raises(InvalidParameter, match="'org/base', but 'org/Base' is") as caught:
        load_runtime(tmp_path)
    assert caught.value.field == "model"
