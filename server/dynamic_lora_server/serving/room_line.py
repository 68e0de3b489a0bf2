"""The line of those who wait for room on the device."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

# How long the first in the line waits before nobody overtakes it any more.
PATIENCE_S = 2.0


class RoomLine:
    """First come, first served. Lives on one event loop; `announce` is for that loop's thread.

    Only the first in the line looks for room, each time that some was given back: others would
    read their adapters in vain. Who needs an adapter that is on the device need not wait, until
    the line is `overdue`: adapters that are always in use would never make room.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()  # a fair one
        self._freed = asyncio.Event()
        self._came = 0.0  # who is the first
        self._first_since: float | None = None

    @property
    def waiting(self) -> bool:
        """Whether somebody waits."""
        return self._turn.locked()

    @property
    def overdue(self) -> bool:
        """Whether the first has waited for room for long: all others wait behind it."""
        since = self._first_since
        return since is not None and asyncio.get_running_loop().time() - since > PATIENCE_S

    @asynccontextmanager
    async def first(self) -> AsyncIterator[None]:
        """Wait to be the first, and be it until the block ends."""
        came = asyncio.get_running_loop().time()
        async with self._turn:
            self._came = came
            try:
                yield
            finally:
                self._first_since = None

    def look(self) -> None:
        """Call before looking for room: what is given back from now on ends `wait`."""
        self._freed.clear()

    async def wait(self) -> None:
        """Until room was given back since `look`."""
        # Nobody stands behind one that reads or computes its adapter, for which room may be there.
        self._first_since = self._came
        await self._freed.wait()

    def announce(self) -> None:
        """Say that room was given back."""
        self._freed.set()
