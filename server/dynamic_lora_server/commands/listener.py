"""The HTTP server under the command: it lets answers end by themselves when it is told to stop."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from socket import socket

import uvicorn

from dynamic_lora_server.errors import ServerError

# What ends within a moment once generations have been failed: answers on their way, uploads.
_HARD_STOP_SECONDS = 5


class Listener(uvicorn.Server):
    """Takes no more connections when it is to stop, and waits for the requests that run.

    Those that run on after `grace` seconds are ended by `end_answers`, so that they say why:
    uvicorn would cut them off, with a traceback for each in the log.
    """

    def __init__(
        self, config: uvicorn.Config, end_answers: Callable[[], Awaitable[object]], *, grace: int
    ) -> None:
        config.timeout_graceful_shutdown = grace + _HARD_STOP_SECONDS
        super().__init__(config)
        self._end_answers = end_answers
        self._grace = grace

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Called by uvicorn. Raises ServerError for an address that cannot be listened on."""
        await _check_address(self.config.host, self.config.port)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Called by uvicorn on a signal, and to end the process for another reason."""
        ending = asyncio.create_task(self._end_late_answers())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            with suppress(asyncio.CancelledError):
                await ending

    async def _end_late_answers(self) -> None:
        await asyncio.sleep(self._grace)
        await self._end_answers()


async def _check_address(host: str, port: int) -> None:
    """Listen for a moment: uvicorn would say what is wrong after the model has begun to load."""
    try:
        probe = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port)
    except UnicodeError as error:  # of the codec that names of hosts go through
        raise _refusal(host, port, str(error)) from error
    except OSError as error:
        # The address is in asyncio's text as well; a host's errors have negative numbers.
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else error.strerror
        raise _refusal(host, port, reason) from error
    probe.close()
    await probe.wait_closed()


def _refusal(host: str, port: int, reason: str | None) -> ServerError:
    return ServerError(
        f"Port {port} of {host} cannot be listened on: {reason}.",
        fix="Stop the server that has it, or give another --port or --host.",
    )
