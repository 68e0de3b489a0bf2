"""Reads adapters from the store into host memory, and computes compositions of them."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from dynamic_lora_adapters.compositions.composition import Composition
from dynamic_lora_adapters.compositions.saved import SavedCompositions
from dynamic_lora_adapters.device.incoming import Incoming
from dynamic_lora_adapters.device.slots import AdapterPool
from dynamic_lora_adapters.errors import AdapterCapacityError
from dynamic_lora_adapters.terms import AdapterTerms
from dynamic_lora_server.errors import QueueFull
from dynamic_lora_server.serving.pace import Pace
from dynamic_lora_server.serving.work_pool import WorkPool

T = TypeVar("T")

# What is read at a time: each takes a core, and as much memory as its terms. A sum reads its
# parts, and a merge may take minutes: no kind holds up another.
_NUM_THREADS = {"adapter": 2, "sum": 1, "merge": 1}
_MOST_MERGES = 8  # that wait for their turn
# What a merge may take of the memory for adapters: a request makes one up, and all others would
# have to leave for one that takes most of it.
_MERGE_SHARE = 0.5


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
        self._threads = {
            kind: WorkPool(kind, num_threads=num_threads, max_waiting=None)
            for kind, num_threads in _NUM_THREADS.items()
        }
        self._merge = asyncio.Lock()  # a fair one
        self._num_merges = 0
        self._pace = Pace()

    @property
    def num_merges_waiting(self) -> int:
        """Merges that wait for their turn."""
        return max(self._num_merges - 1, 0)

    def queues(self) -> dict[str, int]:
        """How many adapters, sums and merges wait to be read or computed."""
        waiting = {kind: threads.num_waiting for kind, threads in self._threads.items()}
        # Whose turn it is may wait for the thread of one that was given up.
        return {**waiting, "merge": self.num_merges_waiting + waiting["merge"]}

    async def read(self, wanted: Composition, digests: Sequence[str]) -> Incoming:
        """What is wanted, of contents that the caller has leased, and the room that it needs.

        Raises what `SavedCompositions.terms` does, AdapterCapacityError for more than there is,
        and, before it is computed, for a merge of more than its share.
        """
        given_up = threading.Event()

        def work() -> Incoming:
            terms = self._saved.terms(wanted, digests, given_up.is_set, self._check_share)
            return self._pool.prepare(terms)

        try:
            found, seconds = await self._threads[_kind(wanted)].run(partial(_timed, work))
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

    def _check_share(self, merged: AdapterTerms) -> None:
        needed = self._pool.reckoner.reckon(merged).num_bytes
        most = self._pool.stats().budget_bytes * _MERGE_SHARE
        if needed > most:
            raise AdapterCapacityError(
                f"The merged deltas need {needed} bytes on the device; a merge may take "
                f"{most:.0f}, half of what adapters may use.",
                fix="Use merge_strategy linear, whose sums take no more than their parts, or start "
                "the server with a larger --adapter-memory.",
            )

    def close(self) -> None:
        """Read no more."""
        for threads in self._threads.values():
            threads.close()


def _kind(wanted: Composition) -> str:
    if wanted.merge is not None:
        return "merge"
    return "sum" if wanted.plain is None else "adapter"


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """What `work` returns, and the seconds it took."""
    began = time.perf_counter()
    return work(), time.perf_counter() - began
