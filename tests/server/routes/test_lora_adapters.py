"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter` on a server in this process."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamic_lora_adapters.files.archive import Intake
from dynamic_lora_server.app import create_app
from dynamic_lora_server.intake import publishing
from dynamic_lora_server.intake.sources import source_of
from tests.support.adapters import make_adapter
from tests.support.models import tiny_llama
from tests.support.runtimes import load_runtime, tiny_config

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that may read adapters below `folder`/adapters."""
    ready = asyncio.Event()
    options = {"adapter_roots": (folder / "adapters",), "admin_keys": ("admin",)}
    app = create_app(
        tiny_config(folder, **options),
        load=partial(load_runtime, folder, **options),
        on_ready=lambda _: ready.set(),
    )
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=transport, base_url="http://server", headers={"authorization": "Bearer admin"}
        ) as client,
    ):
        await asyncio.wait_for(ready.wait(), 60)
        yield client


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for seed, name in enumerate(("one", "two")):
        make_adapter(tmp_path / "adapters" / name, tiny_llama(), seed=seed)
    return tmp_path


async def test_an_adapter_comes_and_goes_as_in_vllm(folders: Path) -> None:
    async with serving(folders) as client:
        body = {"lora_name": "tone", "lora_path": str(folders / "adapters" / "one")}
        loaded = await client.post(LOAD, json=body)
        assert (loaded.status_code, loaded.text) == (
            200,
            "Success: LoRA adapter 'tone' added successfully.",
        )
        listed = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed][1:] == ["tone"]
        prompt = {"model": "tone", "prompt": "the king", "max_tokens": 2}
        assert (await client.post("/v1/completions", json=prompt)).status_code == 200
        unloaded = await client.post(UNLOAD, json={"lora_name": "tone"})
        assert (unloaded.status_code, unloaded.text) == (
            200,
            "Success: LoRA adapter 'tone' removed successfully.",
        )
        assert (await client.post("/v1/completions", json=prompt)).status_code == 404
        again = await client.post(UNLOAD, json={"lora_name": "tone"})
        assert (again.status_code, again.json()["error"]["param"]) == (404, "lora_name")
        again = await client.post(UNLOAD, json={"lora_name": "tone"})
        assert again.status_code == 404
        assert "'tone'" in again.json()["error"]["message"]


async def test_a_name_gets_other_content_only_in_place(folders: Path) -> None:
    async with serving(folders) as client:
        assert (
            await client.post(LOAD, json={"lora_name": "tone", "lora_path": "one"})
        ).status_code == 200
        before = (await client.get("/adapters/tone")).json()["version"]
        other = {"lora_name": "tone", "lora_path": "two"}
        refused = await client.post(LOAD, json=other)
        assert refused.status_code == 400
        assert "has already been loaded" in refused.json()["error"]["message"]
        assert (await client.get("/adapters/tone")).json()["version"] == before
        assert (await client.post(LOAD, json={**other, "load_inplace": True})).status_code == 200
        assert (await client.get("/adapters/tone")).json()["version"] != before


async def test_of_two_that_load_a_new_name_at_once_one_is_told_that_it_is_there(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has found the name free, and then fetches its own content."""
    both_fetch, fetch = threading.Barrier(2), publishing._fetch

    def together(*args: Any) -> Intake:
        both_fetch.wait(60)
        return fetch(*args)

    async with serving(folders) as client:
        monkeypatch.setattr(publishing, "_fetch", together)
        bodies = [{"lora_name": "tone", "lora_path": path} for path in ("one", "two")]
        answers = await asyncio.gather(*(client.post(LOAD, json=body) for body in bodies))
        assert sorted(answer.status_code for answer in answers) == [200, 400]
        (refused,) = (answer for answer in answers if answer.status_code == 400)
        assert "has already been loaded" in refused.json()["error"]["message"]
        assert refused.json()["error"]["param"] == "lora_name"
        (loaded,) = (
            body["lora_path"]
            for body, answer in zip(bodies, answers, strict=True)
            if answer.status_code == 200
        )
        monkeypatch.undo()
        again = {"name": "tone", "source": loaded}
        assert (await client.post("/adapters", json=again)).status_code == 200  # what it has


@pytest.mark.parametrize(
    ("route", "body", "text"),
    [
        (LOAD, {"lora_name": "tone"}, "lora_path"),
        (LOAD, {"lora_name": "tone", "lora_path": "/etc"}, "is not below a folder"),
        (LOAD, {"lora_name": "tone", "lora_path": "one", "is_3d_lora_weight": True}, "is_3d"),
        (LOAD, {"lora_name": "to ne", "lora_path": "one"}, "to ne"),
        (UNLOAD, {"lora_name": "tone", "lora_int_id": 3}, "lora_int_id"),
    ],
)
async def test_what_cannot_be_done_is_said(
    folders: Path, route: str, body: dict[str, object], text: str
) -> None:
    async with serving(folders) as client:
        answer = await client.post(route, json=body)
        assert answer.status_code == 400
        assert text in str(answer.json()["error"])
        assert (await client.get("/health")).status_code == 200


async def test_errors_name_the_fields_that_were_sent(folders: Path) -> None:
    async with serving(folders) as client:
        for name, path, param in (("tone", "/etc", "lora_path"), ("to ne", "one", "lora_name")):
            answer = await client.post(LOAD, json={"lora_name": name, "lora_path": path})
            assert answer.json()["error"]["param"] == param


async def test_only_an_administrator_may(folders: Path) -> None:
    async with serving(folders) as client:
        for route in (LOAD, UNLOAD):
            answer = await client.post(route, json={}, headers={"authorization": ""})
            assert answer.status_code == 401


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("org/adapter", "hf://org/adapter"),
        ("org/adapter@main", "hf://org/adapter@main"),
        ("org/here", "org/here"),
        ("../here", "../here"),
        ("/org/adapter", "/org/adapter"),
        ("adapter", "adapter"),
        ("hf://org/adapter", "hf://org/adapter"),
    ],
)
def test_a_repository_is_the_hubs_unless_a_root_has_it(
    tmp_path: Path, path: str, source: str
) -> None:
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert source_of(path, [tmp_path]) == source


async def test_a_name_that_no_disk_holds_is_refused(folders: Path) -> None:
    async with serving(folders) as client:
        for path in (f"one/{'x' * 300}", f"{'x' * 300}/one"):
            answer = await client.post(LOAD, json={"lora_name": "tone", "lora_path": path})
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] == "lora_path"
