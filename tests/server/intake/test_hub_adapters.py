"""Adapters that are fetched from the Hub at their first request: who waits for what."""

import asyncio
import logging
from collections.abc import Callable

import pytest

from dynamic_lora_adapters.compositions.composition import VersionNotFound
from dynamic_lora_adapters.errors import (
    AdapterError,
    AdapterNotFound,
    IncompatibleAdapter,
    StoreFailed,
)
from dynamic_lora_server.errors import InvalidParameter, NotReady, QueueFull, ServerError
from dynamic_lora_server.intake import hub_adapters as module
from dynamic_lora_server.intake import hub_failures
from dynamic_lora_server.intake.hub_adapters import HubAdapters
from dynamic_lora_server.intake.sources import NotOnHub, SourceUnavailable


class Server:
    """Names that are there, and a Hub whose fetches wait for `gate`."""

    def __init__(self, *organisations: str, max_waiting: int = 99) -> None:
        self.names: set[str] = set()
        self.fetched: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.keeps = True
        self.now = 0.0
        self.hub = HubAdapters(
            organisations, self._publish, max_waiting=max_waiting, clock=lambda: self.now
        )

    async def _publish(self, name: str) -> None:
        self.fetched.append(name)
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        if self.keeps:
            self.names.add(name)

    def select(self, *names: str) -> Callable[[], tuple[str, ...]]:
        def look() -> tuple[str, ...]:
            for name in names:
                if name not in self.names:
                    raise AdapterNotFound(name)
            return names

        return look

    async def ask(self, *names: str, wanted: bool = False) -> tuple[str, ...]:
        return await self.hub.found(self.select(*names), wanted=wanted)


async def settled() -> None:
    for _ in range(9):
        await asyncio.sleep(0)


@pytest.mark.parametrize("organisations", [("*",), ("org", "Other"), ("ORG", "other")])
async def test_all_that_is_missing_is_fetched(organisations: tuple[str, ...]) -> None:
    server = Server(*organisations)
    server.names = {"here", "org/here"}
    wanted = ("here", "org/here", "org/Name", "other/x")
    assert await server.ask(*wanted) == wanted
    assert server.fetched == ["org/Name", "other/x"]
    assert await server.ask("org/Name") == ("org/Name",)
    assert len(server.fetched) == 2


@pytest.mark.parametrize(
    ("organisations", "name", "why"),
    [
        ((), "org/x", "without --fetch-from-hub"),
        (("other",), "org/x", "fetches nothing of 'org'"),
        (("*",), "ner", "which is organisation/name"),
        (("*",), "a/b/c", "which is organisation/name"),
        (("*",), "../x", "which is organisation/name"),
        (("*",), f"org/{'x' * 140}", "which is organisation/name"),
    ],
)
async def test_what_is_not_fetched(organisations: tuple[str, ...], name: str, why: str) -> None:
    server = Server(*organisations)
    with pytest.raises(AdapterNotFound):
        await server.ask(name)
    with pytest.raises(InvalidParameter, match=why) as caught:
        await server.ask(name, wanted=True)
    assert caught.value.field == "parameters.adapter_source"
    assert server.fetched == []


async def test_a_version_that_is_not_there_is_not_looked_for() -> None:
    def pinned() -> None:
        raise VersionNotFound("org/x", "0" * 8, "1" * 64)

    server = Server("*")
    with pytest.raises(VersionNotFound):
        await server.hub.found(pinned)
    assert server.fetched == []


async def test_all_wait_for_one_fetch_and_may_leave() -> None:
    server = Server("*")
    server.gate.clear()
    asked = [asyncio.ensure_future(server.ask("org/x")) for _ in range(4)]
    await settled()
    asked[0].cancel()
    asked[3].cancel()
    await settled()
    server.gate.set()
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(answer) for answer in answers] == [
        *(asyncio.CancelledError, tuple, tuple, asyncio.CancelledError)
    ]
    assert server.fetched == ["org/x"]


async def test_a_fetch_ends_although_nobody_waits(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server = Server("*")
    for name, failure in (("org/x", None), ("org/y", SourceUnavailable("away"))):
        server.gate.clear()
        server.failure = failure
        asked = asyncio.ensure_future(server.ask(name))
        await settled()
        asked.cancel()
        await settled()
        server.gate.set()
        await settled()
    assert server.names == {"org/x"}
    assert "adapter 'org/x' from the Hub: fetched" in caplog.text
    assert "adapter 'org/y' from the Hub: away" in caplog.text


@pytest.mark.parametrize(
    ("failure", "expected", "field", "pauses"),
    [
        (NotOnHub("no", field="source"), AdapterNotFound, "adapter", (30, 60)),
        (SourceUnavailable("away", field="source"), SourceUnavailable, "adapter", (5, 10)),
        (StoreFailed("the disk is full"), StoreFailed, None, (5, 10)),
        (IncompatibleAdapter("other base", field="x"), IncompatibleAdapter, "x", (30, 60)),
        (OSError("a fault of ours"), ServerError, "adapter", (5, 10)),
    ],
)
async def test_a_failure_is_everybodys_until_it_is_tried_again(
    failure: Exception,
    expected: type[AdapterError | ServerError],
    field: str | None,
    pauses: tuple[int, int],
) -> None:
    server = Server("*")
    server.failure = failure
    for num_fetches, pause in enumerate(pauses, start=1):
        asked = [server.ask("org/x", wanted=True) for _ in range(3)]
        errors = await asyncio.gather(*asked, return_exceptions=True)
        server.now += pause - 0.5
        with pytest.raises((AdapterError, ServerError)) as late:
            await server.ask("org/x")
        told = late.value
        assert isinstance(told, AdapterError | ServerError)
        for error in errors:
            assert isinstance(error, AdapterError | ServerError)
            assert (type(error), error.field) == (expected, field)
            assert error.message == told.message == str(told)
            assert (error.fix or "").endswith(f"asks the Hub again in {pause} s.")
        assert (told.fix or "").endswith("in 1 s.")
        assert len(server.fetched) == num_fetches
        server.now += 0.5
    server.failure = None
    assert await server.ask("org/x") == ("org/x",)
    assert len(server.fetched) == 3
    server.names.clear()
    assert await server.ask("org/x") == ("org/x",)


async def test_a_failure_is_told_to_each_anew_and_says_nothing_of_other_names() -> None:
    server = Server("*")
    server.failure = SourceUnavailable("away", fix="Look at the connection.")
    errors = []
    for _ in range(2):
        with pytest.raises(SourceUnavailable) as caught:
            await server.ask("org/x")
        errors.append(caught.value)
        server.now += 2
    assert errors[0] is not errors[1]
    assert [error.retry_after for error in errors] == [5, 3]
    assert errors[1].fix == "Look at the connection. The server asks the Hub again in 3 s."
    server.failure = None
    assert await server.ask("org/y") == ("org/y",)


@pytest.mark.parametrize(("failure", "longest"), [(NotOnHub("no"), 900), (OSError(), 60)])
async def test_pauses_grow_to_an_end(failure: Exception, longest: int) -> None:
    server = Server("*")
    server.failure = failure
    for _ in range(30):
        with pytest.raises((AdapterNotFound, ServerError)):
            await server.ask("org/x")
        server.now += longest
    assert len(server.fetched) == 30
    server.now -= 1
    with pytest.raises((AdapterNotFound, ServerError)):
        await server.ask("org/x")
    assert len(server.fetched) == 30


async def test_so_many_failures_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_failures, "_MOST_KEPT", 2)
    server = Server("*")
    server.failure = NotOnHub("no")
    for name in ("org/x", "org/y", "org/z", "org/z", "org/y", "org/x"):
        with pytest.raises(AdapterNotFound):
            await server.ask(name)
    assert server.fetched == ["org/x", "org/y", "org/z", "org/x"]


async def test_what_is_gone_again_is_fetched_once_for_a_request() -> None:
    server = Server("*")
    server.keeps = False
    with pytest.raises(AdapterNotFound):
        await server.ask("org/x")
    assert server.fetched == ["org/x"]


async def test_no_more_wait_than_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_FETCHES", 2)
    server = Server("*", max_waiting=3)
    server.gate.clear()
    waiting = [asyncio.ensure_future(server.ask(name)) for name in ("org/x", "org/y")]
    await settled()
    with pytest.raises(QueueFull, match="2 adapters are being fetched"):
        await server.ask("org/z")
    waiting.append(asyncio.ensure_future(server.ask("org/x")))
    await settled()
    with pytest.raises(QueueFull, match="3 requests wait") as caught:
        await server.ask("org/x")
    assert caught.value.retry_after >= 1
    waiting[0].cancel()
    await settled()
    waiting.append(asyncio.ensure_future(server.ask("org/x")))
    await settled()
    server.gate.set()
    assert await asyncio.gather(*waiting[1:]) == [("org/y",), ("org/x",), ("org/x",)]


async def test_who_waits_when_the_server_ends_is_told() -> None:
    server = Server("*")
    server.gate.clear()
    waiting = [asyncio.ensure_future(server.ask("org/x")) for _ in range(2)]
    await settled()
    server.hub.give_up()
    for one in waiting:
        with pytest.raises(NotReady, match="shutting down"):
            await one
    with pytest.raises(NotReady, match="shutting down"):
        await server.ask("org/y")
    assert server.fetched == ["org/x"]
    assert server.names == set()
