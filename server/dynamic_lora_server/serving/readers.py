"""Reads adapters from the store into host memory, and computes compositions of them."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from dynamic_lora_adapters.compositions.compose import check_share
from dynamic_lora_adapters.compositions.composition import Composition
from dynamic_lora_adapters.compositions.saved import SavedCompositions
from dynamic_lora_adapters.device.incoming import Incoming
from dynamic_lora_adapters.device.slots import AdapterPool
from dynamic_lora_server.errors import QueueFull
from dynamic_lora_server.serving.pace import Pace

T = TypeVar("T")

# Adapters that are read at a time: each takes a core, and as much memory as its terms. Beside
# them one sum is added up, which reads its parts, and one merge is computed, which may take
# minutes: neither holds up the others.
_NUM_READERS = 2
_MOST_MERGES = 8  # that wait for their turn


@dataclass(slots=True)
class ReadStats:
    """Adapters read from the store into host memory so far, and how long that took, checks
    included."""

    num_reads: int = 0
    seconds: float = 0.0


class AdapterReaders:
    """Threads that read adapters, add up sums and compute merges. Lives on one event loop."""

    def __init__(self, saved: SavedCompositions, pool: AdapterPool) -> None:
        self.stats = ReadStats()
        self._saved = saved
        self._pool = pool
        self._adapters = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="adapters")
        self._sums = ThreadPoolExecutor(1, thread_name_prefix="sums")
        self._merges = ThreadPoolExecutor(1, thread_name_prefix="merges")
        self._merge = asyncio.Lock()  # a fair one
        self._num_merges = 0
        self._pace = Pace()

    @property
    def num_merges_waiting(self) -> int:
        """Merges that wait for their turn."""
        return max(self._num_merges - 1, 0)

    async def read(self, wanted: Composition, digests: Sequence[str]) -> Incoming:
        """What is wanted, of contents that the caller has leased, and the room that it needs.

        Raises what `SavedCompositions.terms` does, AdapterCapacityError for more than there is.
        """
        given_up = threading.Event()

        def work() -> Incoming:
            incoming = self._pool.prepare(self._saved.terms(wanted, digests, given_up.is_set))
            if wanted.merge is not None:
                check_share(incoming.num_bytes, self._pool.stats().budget_bytes)
            return incoming

        loop = asyncio.get_running_loop()
        try:
            found, seconds = await loop.run_in_executor(self._executor(wanted), _timed, work)
        except asyncio.CancelledError:
            given_up.set()
            raise
        self.stats.num_reads += 1
        self.stats.seconds += seconds
        return found

    @asynccontextmanager
    async def merging(self) -> AsyncIterator[None]:
        """The turn of one merge, from its computation until it is on the device.

        So it is computed once, and memory holds no others that wait for room. Raises QueueFull
        where too many wait for their turn.
        """
        if self.num_merges_waiting >= _MOST_MERGES:
            raise QueueFull(
                f"{self.num_merges_waiting} merges of adapters wait to be computed; the server "
                "takes no more.",
                retry_after=self._pace.retry_after(1),
            )
        self._num_merges += 1
        try:
            async with self._merge:
                began = time.monotonic()
                yield
                self._pace.record(time.monotonic() - began)
        finally:
            self._num_merges -= 1

    def close(self) -> None:
        """Read no more."""
        for executor in (self._adapters, self._sums, self._merges):
            executor.shutdown(wait=False, cancel_futures=True)

    def _executor(self, wanted: Composition) -> Executor:
        if wanted.merge is not None:
            return self._merges
        return self._adapters if wanted.plain is not None else self._sums


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """What `work` returns, and the seconds it took."""
    began = time.perf_counter()
    return work(), time.perf_counter() - began
