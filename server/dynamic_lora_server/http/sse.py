"""Server-sent events: how they are framed and sent."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from dynamic_lora_server.http.access_log import request_id
from dynamic_lora_server.http.disconnect import ClientDisconnected, until_disconnect

EVENT_STREAM = "text/event-stream"
# Proxies must pass events on as they come.
_NEVER_STORED = {"cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"  # OpenAI's end of a stream
# What a client may take to read on once the buffers between are full: its place is wanted.
_STALLED_SECONDS = 120.0
_LOOKS = 8  # meanwhile
# They end a line for clients that split lines as Unicode does. JSON holds them inside texts alone.
_LINE_ENDS = {end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}

_log = logging.getLogger(__name__)


def event(data: BaseModel, name: str | None = None) -> bytes:
    """One event: a model as JSON on one `data:` line, behind an `event:` line with its name."""
    document = data.model_dump_json()
    for end, escaped in _LINE_ENDS.items():
        document = document.replace(end, escaped)
    named = "" if name is None else f"event: {name}\n"
    return f"{named}data: {document}\n\n".encode()


def json_event(data: Mapping[str, Any]) -> bytes:
    """One event: a plain object as JSON on one `data:` line."""
    return f"data: {json.dumps(data)}\n\n".encode()


class EventStream(Response):
    """Sends the events of a generator as they come and closes it when the client goes.

    The generator is closed in every case, so that what it holds is freed at
    once: after its last event, on an error, on a disconnect, and where the client reads nothing
    for two minutes.
    """

    media_type = EVENT_STREAM

    def __init__(
        self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str] | None = None
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self.init_headers({**_NEVER_STORED, **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run as an ASGI application."""
        del scope
        async with aclosing(self._events):
            try:
                await until_disconnect(receive, self._send(send))
            except ClientDisconnected:
                return

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with _read_on(send) as taken:
            await taken(start)  # an answer before it may not have been read yet
            async for chunk in self._events:
                await taken({"type": "http.response.body", "body": chunk, "more_body": True})
            await taken({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def _read_on(send: Send) -> AsyncIterator[Send]:
    """`send`, for a client that reads on; raises ClientDisconnected where it does not."""
    try:
        async with asyncio.timeout(None) as limit:
            watched = _Watched(send, limit)
            try:
                yield watched
            finally:
                watched.stop()
    except TimeoutError:
        if not limit.expired():
            raise
        _log.info("a stream ends that nobody reads (request %s)", request_id())
        raise ClientDisconnected from None


class _Watched:
    """`send`, of which a call that is not taken in time has `limit` expire.

    That is looked at now and then: a timer for each event took a seventh of what the thread that
    writes answers does for it.
    """

    def __init__(self, send: Send, limit: asyncio.Timeout) -> None:
        self._loop = asyncio.get_running_loop()
        self._send = send
        self._limit = limit
        self._since: float | None = None  # when what is being sent was begun
        self._timer = self._look_later()

    async def __call__(self, message: Message) -> None:
        self._since = self._loop.time()
        await self._send(message)
        self._since = None

    def stop(self) -> None:
        """Look no more."""
        self._timer.cancel()

    def _look_later(self) -> asyncio.TimerHandle:
        return self._loop.call_later(_STALLED_SECONDS / _LOOKS, self._look)

    def _look(self) -> None:
        if self._since is not None and self._loop.time() - self._since >= _STALLED_SECONDS:
            self._limit.reschedule(self._loop.time())
        else:
            self._timer = self._look_later()
