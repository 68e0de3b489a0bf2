"""A cap on request bodies that are read whole into memory."""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamic_lora_server.errors import QueueFull
from dynamic_lora_server.http.problems import answer, fault_of
from dynamic_lora_server.intake.uploads import MULTIPART, media_type

# Bodies of the largest size that may be held at a time.
_MAX_HELD = 64
_RETRY_SECONDS = 5


class BodyLimit:
    """ASGI middleware: 413 for a body above `max_bytes`, declared or counted.

    429 where what has come of all bodies whose requests are not answered yet is 64 times as much:
    until a body is there, nobody knows whether there is a place for the request, and while one
    waits to be parsed, rendered and run its body is in memory.
    Uploads (multipart to /adapters) go to disk as they come and have a cap of their own.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._num_held = 0  # bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run as an ASGI application."""
        if scope["type"] != "http" or self._is_upload(scope):
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            refusal = answer(fault_of(self._too_large()), path=scope["path"])
            await refusal(scope, receive, send)
            return
        num_bytes = 0  # of this body

        async def counting() -> Message:
            nonlocal num_bytes
            message = await receive()
            size = len(message.get("body", b""))
            num_bytes += size
            self._num_held += size
            if num_bytes > self._max_bytes:
                raise self._too_large()
            if size and self._num_held > _MAX_HELD * self._max_bytes:
                raise self._too_many()
            return message

        try:
            await self._app(scope, counting, send)
        finally:
            self._num_held -= num_bytes

    def _is_upload(self, scope: Scope) -> bool:
        content_type = Headers(scope=scope).get("content-type", "")
        return scope["path"] == "/adapters" and media_type(content_type) == MULTIPART

    def _too_many(self) -> QueueFull:
        return QueueFull(
            f"Bodies of {self._num_held:,} bytes in all are on their way or not answered yet; the "
            "server takes no more.",
            retry_after=_RETRY_SECONDS,
        )

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"The body is larger than {self._max_bytes:,} bytes.")
