"""Event streams: framing, and closing the generator when the client goes."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from pydantic import BaseModel
from starlette.types import Message

from dynamic_lora_server.http import sse
from dynamic_lora_server.http.disconnect import ClientDisconnected, until_disconnect
from dynamic_lora_server.http.sse import EventStream, event, json_event


class Line(BaseModel):
    text: str


class Client:
    """The other side of an ASGI connection; `leave` closes it."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.gone = asyncio.Event()

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)


def test_an_event_is_one_line_whatever_the_text() -> None:
    assert event(Line(text="a\nb")) == b'data: {"text":"a\\nb"}\n\n'
    assert json_event({"error": "é\n"}) == b'data: {"error": "\\u00e9\\n"}\n\n'


@pytest.mark.parametrize(
    "end", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x7f", "\x85", "\u2028", "\u2029"]
)
def test_an_event_is_one_line_also_to_python(end: str) -> None:
    text = f"a{end}é"
    line, *others = event(Line(text=text)).decode().splitlines()
    assert others == [""]
    assert json.loads(line.removeprefix("data: ")) == {"text": text}


async def test_all_events_are_sent() -> None:
    async def numbers() -> AsyncGenerator[bytes, None]:
        yield b"1"
        yield b"2"

    client = Client()
    await EventStream(numbers(), {"x-adapter": "ner"})({}, client.receive, client.send)
    start, *bodies = client.sent
    assert (b"x-adapter", b"ner") in start["headers"]
    assert (b"content-type", b"text/event-stream; charset=utf-8") in start["headers"]
    assert [m["body"] for m in bodies] == [b"1", b"2", b""]
    assert [m["more_body"] for m in bodies] == [True, True, False]


async def test_a_client_that_goes_closes_the_generator_at_once() -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[bytes, None]:
        try:
            yield b"1"
            await asyncio.Event().wait()
        finally:
            closed.set()

    client = Client()
    stream = EventStream(endless())
    answering = asyncio.create_task(stream({}, client.receive, client.send))
    while len(client.sent) < 2:
        await asyncio.sleep(0)
    client.gone.set()
    await asyncio.wait_for(answering, 60)
    assert closed.is_set()


@pytest.mark.parametrize("num_taken", [0, 3, 5])
async def test_a_client_that_reads_no_more_closes_the_generator(
    num_taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it takes nothing, some events, or all but the end."""
    monkeypatch.setattr(sse, "_STALLED_SECONDS", 0.05)
    closed = asyncio.Event()

    async def four() -> AsyncGenerator[bytes, None]:
        try:
            for _ in range(4):
                yield b"1"
        finally:
            closed.set()

    class Stalled(Client):
        async def send(self, message: Message) -> None:
            if len(self.sent) == num_taken:
                await asyncio.Event().wait()
            await super().send(message)

    client, events = Stalled(), four()
    await asyncio.wait_for(EventStream(events)({}, client.receive, client.send), 5)
    with pytest.raises(StopAsyncIteration):
        await anext(events)
    assert closed.is_set() == (num_taken > 0), "what never began has nothing to close"
    assert len(client.sent) == num_taken


async def test_a_client_may_wait_for_an_event_as_long_as_that_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sse, "_STALLED_SECONDS", 0.05)

    async def slow() -> AsyncGenerator[bytes, None]:
        yield b"1"
        await asyncio.sleep(0.3)
        yield b"2"

    client = Client()
    await EventStream(slow())({}, client.receive, client.send)
    assert [m["body"] for m in client.sent[1:]] == [b"1", b"2", b""]


async def test_a_stream_that_was_sent_leaves_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []
    call_later = loop.call_later

    def noting(*args: Any, **options: Any) -> asyncio.TimerHandle:
        timers.append(call_later(*args, **options))
        return timers[-1]

    monkeypatch.setattr(loop, "call_later", noting)

    async def one() -> AsyncGenerator[bytes, None]:
        yield b"1"

    client = Client()
    await EventStream(one())({}, client.receive, client.send)
    assert len(client.sent) == 3
    assert timers
    assert all(timer.cancelled() for timer in timers)


@pytest.mark.parametrize("error", [ValueError("broken"), TimeoutError("broken")])
async def test_an_error_closes_the_generator_and_comes_out(error: Exception) -> None:
    async def broken() -> AsyncGenerator[bytes, None]:
        yield b"1"
        raise error

    client = Client()
    with pytest.raises(type(error), match="broken"):
        await EventStream(broken())({}, client.receive, client.send)


async def test_work_of_a_client_that_goes_is_cancelled() -> None:
    cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    client = Client()
    client.gone.set()
    with pytest.raises(ClientDisconnected):
        await until_disconnect(client.receive, work())
    assert cancelled.is_set()


async def test_finished_work_wins() -> None:
    async def work() -> int:
        return 5

    client = Client()
    client.gone.set()
    assert await until_disconnect(client.receive, work()) == 5
