"""`/adapters` on a server in this process: what holds up whom, and what cannot be read."""

import asyncio
import shutil
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest

from dynamic_lora_adapters.errors import UnsupportedAdapter
from dynamic_lora_adapters.files.archive import Intake
from dynamic_lora_adapters.home.inspection import AdapterVersion, Inspector
from dynamic_lora_server.app import create_app
from dynamic_lora_server.intake import publishing
from dynamic_lora_server.intake.sources import SourceUnavailable
from dynamic_lora_server.runtime import Runtime
from tests.support.adapters import make_adapter
from tests.support.models import tiny_llama
from tests.support.runtimes import load_runtime, publish, tiny_config


@asynccontextmanager
async def serving(
    folder: Path, load: Callable[[Path], Runtime] = load_runtime
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that is ready, on this event loop."""
    ready = asyncio.Event()
    app = create_app(
        tiny_config(folder),
        load=partial(load, folder),
        on_ready=lambda _: ready.set(),
    )
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client,
    ):
        await asyncio.wait_for(ready.wait(), 60)
        yield client


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", tiny_llama())


async def upload(client: httpx.AsyncClient, name: str, folder: Path) -> httpx.Response:
    parts = [("files", (path.name, path.read_bytes())) for path in folder.iterdir()]
    return await client.post("/adapters", data={"name": name}, files=parts)


class Crowd:
    """How many were in it at a time, at most.

    Nobody leaves before `places` are in, and then stays for a moment in which more could come.
    """

    def __init__(self, places: int) -> None:
        self.most = 0
        self._all_in = threading.Barrier(places, timeout=60)
        self._num_in = 0
        self._lock = threading.Lock()

    @contextmanager
    def entered(self) -> Iterator[None]:
        with self._lock:
            self._num_in += 1
            self.most = max(self.most, self._num_in)
        try:
            self._all_in.wait()
            time.sleep(0.05)
            yield
        finally:
            with self._lock:
                self._num_in -= 1


def note_threads(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """Which threads remove folders from now on."""
    threads: list[threading.Thread] = []
    rmtree: Callable[..., None] = shutil.rmtree

    def noting(*args: Any, **kwargs: Any) -> None:
        threads.append(threading.current_thread())
        rmtree(*args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", noting)
    return threads


async def test_no_files_are_removed_on_the_event_loop(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as client:
        threads = note_threads(monkeypatch)
        assert (await upload(client, "ner", adapter)).status_code == 201
        assert (await upload(client, "Bad Name", adapter)).status_code == 422
        (adapter / "adapter_config.json").unlink()
        assert (await upload(client, "ner", adapter)).status_code == 422
        assert (await client.delete("/adapters/ner")).status_code == 204
        monkeypatch.undo()
    assert len(threads) >= 7
    assert threading.current_thread() not in threads
    assert list((tmp_path / "home" / "staging").iterdir()) == []


async def test_two_uploads_are_checked_at_a_time(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes as much memory as its terms."""
    inspect, crowd = Inspector.inspect, Crowd(2)

    def slowly(*args: Any, **kwargs: Any) -> AdapterVersion:
        with crowd.entered():
            return inspect(*args, **kwargs)

    async with serving(tmp_path) as client:
        monkeypatch.setattr(Inspector, "inspect", slowly)
        answers = await asyncio.gather(*(upload(client, f"a-{i}", adapter) for i in range(4)))
    assert [answer.status_code for answer in answers] == [201] * 4
    assert crowd.most == 2


async def test_two_uploads_are_unpacked_at_a_time(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, crowd = Intake.add, Crowd(2)

    def slowly(*args: Any) -> None:
        with crowd.entered():
            add(*args)

    async with serving(tmp_path) as client:
        monkeypatch.setattr(Intake, "add", slowly)
        answers = await asyncio.gather(*(upload(client, f"a-{i}", adapter) for i in range(4)))
    assert [answer.status_code for answer in answers] == [201] * 4
    assert crowd.most == 2


async def test_four_sources_are_fetched_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = Crowd(4)

    def slowly(*_: object, **__: object) -> NoReturn:
        with crowd.entered():
            raise SourceUnavailable("The Hub is away.")

    async with serving(tmp_path) as client:
        monkeypatch.setattr(publishing, "fetch_source", slowly)
        body = {"name": "ner", "source": "hf://org/ner"}
        asked = (client.post("/adapters", json=body) for _ in range(8))
        assert {answer.status_code for answer in await asyncio.gather(*asked)} == {502}
    assert crowd.most == 4


async def test_a_name_that_cannot_be_given_is_refused_before_anything_is_fetched(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as client:
        assert (await upload(client, "ner", adapter)).status_code == 201
        saved = await client.put("/compositions/half", json={"adapter": "ner*0.5"})
        assert saved.status_code == 201
        monkeypatch.setattr(publishing, "fetch_source", None)
        monkeypatch.setattr(Intake, "add", None)
        for name, status in (("Bad Name", 422), ("composition", 422), ("half", 409)):
            source = {"name": name, "source": "hf://org/ner"}
            assert (await client.post("/adapters", json=source)).status_code == status
            assert (await upload(client, name, adapter)).status_code == status


async def test_names_that_are_gone_are_not_kept(tmp_path: Path, adapter: Path) -> None:
    loaded: list[Runtime] = []

    def load(folder: Path) -> Runtime:
        loaded.append(load_runtime(folder))
        return loaded[0]

    async with serving(tmp_path, load) as client:
        for name in "ab":
            assert (await upload(client, name, adapter)).status_code == 201
            asked = {"model": name, "prompt": "the king", "max_tokens": 1}
            assert (await client.post("/v1/completions", json=asked)).status_code == 200
        last_named = loaded[0].saved.last_named
        assert last_named.keys() == {"a", "b"}
        assert (await client.delete("/adapters/a")).status_code == 204
        unloaded = await client.post("/v1/unload_lora_adapter", json={"lora_name": "b"})
        assert unloaded.status_code == 200
        assert not last_named


async def test_an_adapter_that_cannot_be_read_any_more_can_be_deleted(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = load_runtime(tmp_path)
    digest = publish(runtime, "ner", adapter)
    runtime.registry.close()
    with sqlite3.connect(tmp_path / "home" / "index.sqlite") as connection:
        connection.execute("UPDATE adapter_versions SET passport = '{}'")
    connection.close()

    def refuse(*_: object, **__: object) -> None:
        raise UnsupportedAdapter("layer_replication = [[0, 2]] is not served.")

    monkeypatch.setattr(Inspector, "inspect", refuse)
    async with serving(tmp_path) as client:
        unreadable = await client.get("/adapters/ner")
        assert unreadable.status_code == 422
        assert "delete it" in unreadable.json()["fix"]
        (listed,) = (await client.get("/adapters")).json()["unreadable"]
        assert (listed["name"], listed["version"]) == ("ner", digest)
        assert listed["reason"] == "layer_replication = [[0, 2]] is not served."
        assert (await client.delete("/adapters/ner")).status_code == 204
        assert (await client.get("/adapters/ner")).status_code == 404
        assert (await client.get("/adapters")).json()["unreadable"] == []
    assert list((tmp_path / "home" / "adapters").iterdir()) == []
