"""The line of those who wait for room on the device."""

import asyncio
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress

# How long somebody waits in the line before who is first may claim the room of adapters.
PATIENCE_S = 2.0


class RoomLine:
    """First come, first served. Lives on one event loop; `announce` is for that loop's thread.

    Only the first in the line looks for room, each time that some was given back: others would
    read their adapters in vain. Who needs an adapter that is on the device need not wait. But
    adapters that are always in use would never make room: after a while the first in the line
    claims the room of as many as it needs, and no more. Requests for these wait until it is
    served or gone, and all others go on.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()  # a fair one
        self._freed = asyncio.Event()
        self._unclaimed = asyncio.Event()
        self._first_came: float | None = None
        self._num_waiting = 0
        self.claimed: frozenset[str] = frozenset()

    @property
    def waiting(self) -> bool:
        """Whether somebody waits."""
        return self._num_waiting > 0

    @property
    def num_waiting(self) -> int:
        """How many wait in the line, one for each adapter."""
        return self._num_waiting

    @property
    def waited_s(self) -> float:
        """How long the first has waited, 0 where nobody does. Any thread may ask."""
        came = self._first_came
        return 0.0 if came is None else time.monotonic() - came

    @property
    def may_claim(self) -> bool:
        """Whether the first has waited long enough to claim the room of adapters."""
        return self._first_came is not None and self.waited_s >= PATIENCE_S

    @asynccontextmanager
    async def first(self) -> AsyncIterator[None]:
        """Wait to be the first, and be it until the block ends; its claim ends then, too."""
        came = time.monotonic()
        self._num_waiting += 1
        try:
            async with self._turn:
                self._first_came = came
                try:
                    yield
                finally:
                    self._first_came = None
                    self.claim(())
        finally:
            self._num_waiting -= 1

    def look(self) -> None:
        """Call before looking for room: what is given back from now on ends `wait`."""
        self._freed.clear()

    async def wait(self) -> None:
        """Until room was given back since `look`, or until the first may make a claim."""
        patience = None if self.may_claim else PATIENCE_S - self.waited_s
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._freed.wait()

    def announce(self) -> None:
        """Say that room was given back."""
        self._freed.set()

    def claim(self, digests: Collection[str]) -> None:
        """Have requests for these adapters wait, and those for no others."""
        given_up = self.claimed.difference(digests)
        self.claimed = frozenset(digests)
        if given_up:
            self._unclaimed.set()
            self._unclaimed = asyncio.Event()

    async def until_unclaimed(self) -> None:
        """Until a claim ends, which may be that to any adapter.

        Who waits here looks for its adapter before the next in the line can claim it, as that
        has to look for room first.
        """
        await self._unclaimed.wait()
