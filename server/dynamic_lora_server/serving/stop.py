"""The end of all waiting for what will not come any more."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Stop:
    """Ends what waits, and what would begin to wait later, with a reason. Lives on one event loop.

    Who waits is told at once, whatever it waits for: it need not ask.
    """

    def __init__(self) -> None:
        self._why: Exception | None = None
        self._waits: set[asyncio.Timeout] = set()

    def call(self, why: Exception) -> None:
        """End all that heeds it with this error, and refuse all that would."""
        self._why = why
        waits, self._waits = self._waits, set()
        for wait in waits:
            wait.reschedule(0)  # a deadline that has passed

    @asynccontextmanager
    async def heeded(self) -> AsyncIterator[None]:
        """A block that a stop cancels, and that raises its error then, however it fails."""
        self._check()
        try:
            async with asyncio.timeout(None) as wait:
                self._waits.add(wait)
                try:
                    yield
                finally:
                    self._waits.discard(wait)
        except Exception:
            self._check()
            raise

    def _check(self) -> None:
        if self._why is not None:
            raise self._why
