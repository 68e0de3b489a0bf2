"""Brings adapters to the device for requests, without blocking the event loop."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar
from weakref import WeakValueDictionary

from dynamic_lora_adapters.compositions.compose import GivenUp
from dynamic_lora_adapters.compositions.composition import Composition, Part
from dynamic_lora_adapters.compositions.saved import SavedCompositions, check_version
from dynamic_lora_adapters.device.incoming import Incoming
from dynamic_lora_adapters.device.slab import ResidentAdapter
from dynamic_lora_adapters.device.slots import AdapterPool
from dynamic_lora_adapters.files.chat import ChatFormat
from dynamic_lora_adapters.home.lease import Lease
from dynamic_lora_adapters.home.registry import AdapterRegistry
from dynamic_lora_adapters.terms import AdapterTerms
from dynamic_lora_server.serving.room_line import RoomLine

T = TypeVar("T")
_Read = Callable[[], Awaitable[Incoming]]

# Adapters that are read at a time: each takes a core, and as much memory as its terms. Of
# compositions, one is computed beside them: it may take as long as it takes, and hold up no other.
_NUM_READERS = 2


@dataclass(frozen=True, slots=True)
class Held:
    """What a request is served with; `version` is the hash of what is computed.

    `chat` is that of the adapter, if it is one alone.
    """

    composition: Composition
    version: str
    adapter: ResidentAdapter
    chat: ChatFormat | None = None


@dataclass(slots=True)
class ReadStats:
    """Adapters read from the store into host memory so far, and how long that took, checks
    included."""

    num_reads: int = 0
    seconds: float = 0.0


class AdapterLoader:
    """Pairs the registry (what exists) with the pool (what is on the device).

    A request holds leases until its sequences are with the engine: one on each
    of its adapters' versions in the store, one on the slot. From then on each
    sequence has one on the slot (`share`), to its end. A composition has a slot
    of its own, under a digest made of its parts' digests and weights: other
    content is never served from memory that is stale. Several requests for one
    cold adapter share one load; a request that finds all room leased waits in a
    line (`RoomLine`) until leases end.
    """

    def __init__(
        self, registry: AdapterRegistry, pool: AdapterPool, saved: SavedCompositions
    ) -> None:
        self.saved = saved
        self.reads = ReadStats()
        self._registry = registry
        self._pool = pool
        # As long as one waits for a load, who comes later waits for the same.
        self._loads: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._line = RoomLine()
        # Of their own: computing a composition takes seconds, and tokenising waits for nobody.
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="adapters")
        self._composer = ThreadPoolExecutor(1, thread_name_prefix="compositions")
        self._loop: asyncio.AbstractEventLoop | None = None
        self.make_room: Callable[[bool, Callable[[], object]], object] | None = None
        self._why_none: Exception | None = None
        self._parts: dict[str, frozenset[str]] = {}
        self._parts_lock = threading.Lock()
        # Also what was deleted while it was being loaded, and what a new upload replaced.
        registry.on_removed = self.forget

    @asynccontextmanager
    async def hold(self, adapter: str | Composition) -> AsyncIterator[Held | None]:
        """The adapter or composition, on the device until the block ends.

        None for a composition that is the base model. Raises AdapterNotFound
        (with near names), InvalidComposition, UnsupportedAdapter for parts that
        do not compose, and AdapterCapacityError.
        """
        wanted = self.saved.resolve(adapter) if isinstance(adapter, str) else adapter
        if wanted.is_base:
            yield None
            return
        self._loop = asyncio.get_running_loop()
        async with AsyncExitStack() as stack:
            leases = [await stack.enter_async_context(self._lease(p)) for p in wanted.parts]
            digests = [lease.version.digest for lease in leases]
            version = wanted.digest(digests)
            self._remember(version, digests)
            readers = self._composer if wanted.plain is None else self._readers
            read = partial(self._read, readers, partial(self.saved.terms, wanted, digests))
            resident = await self._bring(version, read)
            try:
                # Again: while it waited for room, nobody knew of it.
                self._remember(version, digests)
                chat = None if wanted.alone is None else leases[0].version.chat
                yield Held(wanted, version, resident, chat)
            finally:
                self._pool.release(resident)
                self._line.announce()

    def share(self, adapter: ResidentAdapter) -> Callable[[], None]:
        """A lease of its own for a sequence, of an adapter that is held; call it to end the lease.

        A request may be gone while a step still reads the slot for it: the engine ends this one.
        """
        self._pool.share(adapter)

        def end() -> None:
            self._pool.release(adapter)
            self._announce_soon()

        return end

    def fail_waiters(self, why: Exception) -> None:
        """No more room will be made: whoever waits for some, now or later, gets this error."""
        self._why_none = why
        self._line.announce()

    def close(self) -> None:
        """Read no more."""
        for readers in (self._readers, self._composer):
            readers.shutdown(wait=False, cancel_futures=True)

    def forget(self, digest: str) -> None:
        """Free the device memory of a deleted version, at once or after its last request."""
        with self._parts_lock:
            composed = [c for c, parts in self._parts.items() if digest in parts]
            for gone in composed:
                del self._parts[gone]
        for gone in (digest, *composed):
            self._pool.drop(gone)
        self._ask_for_room(doomed_only=True)

    @asynccontextmanager
    async def _lease(self, part: Part) -> AsyncIterator[Lease]:
        lease = self._registry.lease(part.name)
        try:
            check_version(part, lease.version.digest)
            yield lease
        finally:
            if self._registry.end_lease(lease):
                # Removing the files of a deleted version waits for the disk, and for uploads.
                loop = asyncio.get_running_loop()
                loop.run_in_executor(None, self._registry.collect, lease.version.digest)

    def _remember(self, version: str, digests: Sequence[str]) -> None:
        """Note what a composition was made of; those that left the device are forgotten."""
        if version in digests:
            return
        known = {*self._pool.resident_digests(), *self._loads}
        with self._parts_lock:
            if version not in self._parts:
                self._parts = {c: parts for c, parts in self._parts.items() if c in known}
                self._parts[version] = frozenset(digests)

    async def _bring(self, digest: str, read: _Read) -> ResidentAdapter:
        if (adapter := self._resident(digest)) is not None:
            return adapter
        async with self._loads.setdefault(digest, asyncio.Lock()):
            if (adapter := self._resident(digest)) is not None:
                return adapter
            if not self._line.waiting:
                incoming = await read()
                if (adapter := await self._admit(digest, incoming)) is not None:
                    return adapter
                del incoming  # a line of those who keep theirs would fill the memory
            async with self._line.first():
                return await self._bring_first(digest, read)

    def _resident(self, digest: str) -> ResidentAdapter | None:
        return None if self._line.overdue else self._pool.lease(digest)

    async def _bring_first(self, digest: str, read: _Read) -> ResidentAdapter:
        incoming: Incoming | None = None
        while True:
            self._line.look()
            if (adapter := self._pool.lease(digest)) is not None:
                return adapter
            if incoming is None:
                incoming = await read()
            if (adapter := await self._admit(digest, incoming)) is not None:
                return adapter
            if self._why_none is not None:
                raise self._why_none
            self._ask_for_room()
            await self._line.wait()

    async def _read(self, readers: Executor, read: Callable[[GivenUp], AdapterTerms]) -> Incoming:
        """The terms, and the room they need; AdapterCapacityError for more than there is."""
        loop = asyncio.get_running_loop()
        prepare, given_up = self._pool.prepare, threading.Event()
        try:
            incoming, seconds = await loop.run_in_executor(
                readers, _timed, lambda: prepare(read(given_up.is_set))
            )
        except asyncio.CancelledError:
            given_up.set()
            raise
        self.reads.num_reads += 1
        self.reads.seconds += seconds
        return incoming

    async def _admit(self, digest: str, incoming: Incoming) -> ResidentAdapter | None:
        """On the device; None if all room is leased."""
        try:
            return await _acquire(lambda: self._pool.bring(digest, incoming), self._undo_admission)
        except Exception:
            self._line.announce()  # the room that it had taken
            raise

    def _undo_admission(self, admitted: ResidentAdapter | None) -> None:
        """Take back what was brought, or failed to be, for a request that has gone."""
        if admitted is not None:
            self._pool.release(admitted)
        self._announce_soon()

    def _ask_for_room(self, *, doomed_only: bool = False) -> None:
        """Have what is merged give its slot up, and wake who waits for it."""
        if self.make_room is None or self._loop is None:
            return
        self.make_room(doomed_only, self._announce_soon)

    def _announce_soon(self) -> None:
        """Announce from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._line.announce)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """What `work` returns, and the seconds it took."""
    began = time.perf_counter()
    return work(), time.perf_counter() - began


async def _acquire(acquire: Callable[[], T], undo: Callable[[T | None], object]) -> T:
    """Run `acquire` in a thread; if the caller is cancelled meanwhile, undo it when it is done.

    `undo` gets what was acquired, or None if that failed.
    """
    task = asyncio.ensure_future(asyncio.to_thread(acquire))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(
            lambda done: undo(None if done.cancelled() or done.exception() else done.result())
        )
        raise
