"""A cap on request bodies that are read whole into memory."""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamic_lora_server.problems import answer, fault_of
from dynamic_lora_server.uploads import MULTIPART, media_type


class BodyLimit:
    """ASGI middleware: 413 for a body above `max_bytes`, declared or counted.

    Uploads (multipart to /adapters) go to disk as they come and have a cap of their own.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

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
        num_bytes = 0

        async def counting() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, counting, send)

    def _is_upload(self, scope: Scope) -> bool:
        content_type = Headers(scope=scope).get("content-type", "")
        return scope["path"] == "/adapters" and media_type(content_type) == MULTIPART

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"The body is larger than {self._max_bytes:,} bytes.")
