"""The id of each request, and a line in the log when it has been answered."""

import logging
import re
import time
from contextvars import ContextVar
from dataclasses import dataclass
from urllib.parse import quote
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID = "X-Request-Id"

# Of clients' own ids: visible ASCII characters, so that the log can be read by machines.
_SANE = re.compile(r"[!-~]{1,128}")
# What orchestrators and Prometheus ask again and again.
_PROBES = frozenset({"/health", "/ready", "/metrics"})

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Exchange:
    """One request and what is known of its answer."""

    request_id: str
    adapter: str | None = None
    status: int | None = None


_current: ContextVar[_Exchange | None] = ContextVar("exchange", default=None)


def request_id() -> str:
    """The id of the request that is being answered, "-" outside of one."""
    exchange = _current.get()
    return "-" if exchange is None else exchange.request_id


def note_adapter(name: str) -> None:
    """Say who answers the current request, for its line in the log."""
    exchange = _current.get()
    if exchange is not None:
        exchange.adapter = name


class AccessLog:
    """ASGI middleware, around all others: gives each request an id, and logs it at its end.

    The id is the client's own, if it sent a usable one; the answer carries it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run as an ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get(REQUEST_ID, "")
        exchange = _Exchange(sent if _SANE.fullmatch(sent) else uuid4().hex)
        header = (REQUEST_ID.lower().encode(), exchange.request_id.encode())

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        token = _current.set(exchange)
        began = time.perf_counter()
        try:
            await self._app(scope, receive, named)
        finally:
            _current.reset(token)
            _write(scope, exchange, time.perf_counter() - began)


def _write(scope: Scope, exchange: _Exchange, seconds: float) -> None:
    """One line; the path is written as it was sent, so that it cannot hold a line's end."""
    _log.log(
        logging.DEBUG if scope["path"] in _PROBES else logging.INFO,
        "%s %s %s %.3fs adapter=%s request=%s",
        scope["method"],
        quote(scope["path"]),
        exchange.status or "-",
        seconds,
        exchange.adapter or "-",
        exchange.request_id,
    )
