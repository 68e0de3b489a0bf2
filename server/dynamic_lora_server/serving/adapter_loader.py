"""Brings adapters to the device for requests, without blocking the event loop."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from dynamic_lora_adapters.compositions.composition import Composition, Part
from dynamic_lora_adapters.compositions.saved import SavedCompositions, check_version
from dynamic_lora_adapters.device.incoming import Incoming
from dynamic_lora_adapters.device.slab import ResidentAdapter
from dynamic_lora_adapters.device.slots import AdapterPool
from dynamic_lora_adapters.errors import AdapterError
from dynamic_lora_adapters.files.chat import ChatFormat
from dynamic_lora_adapters.home.lease import Lease
from dynamic_lora_adapters.home.registry import AdapterRegistry
from dynamic_lora_server.serving.readers import AdapterReaders
from dynamic_lora_server.serving.room_line import RoomLine
from dynamic_lora_server.serving.stop import Stop

T = TypeVar("T")
_Read = Callable[[], Awaitable[Incoming]]


@dataclass(frozen=True, slots=True)
class Held:
    """What a request is served with; `version` is the hash of what is computed.

    `chat` is that of the adapter, if it is one alone.
    """

    composition: Composition
    version: str
    adapter: ResidentAdapter
    chat: ChatFormat | None = None


class _Load:
    """What requests for one digest wait for together; `refusals` are for those who wait now."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.num_waiting = 0
        # Per composition, since a refusal names adapters.
        self.refusals: dict[Composition, AdapterError] = {}


class AdapterLoader:
    """Pairs the registry (what exists) with the pool (what is on the device).

    A request holds leases until its sequences are with the engine: one on each
    of its adapters' versions in the store, one on the slot. From then on each
    sequence has one on the slot (`share`), to its end. A composition has a slot
    of its own, under a digest made of its parts' digests and weights: other
    content is never served from memory that is stale. Several requests for one
    cold adapter share one load; a request that finds all room leased waits in a
    line (`RoomLine`) until leases end. Nobody waits for ever: leases end with their sequences,
    and who is first in the line keeps others from taking new ones of what it needs.
    """

    def __init__(
        self, registry: AdapterRegistry, pool: AdapterPool, saved: SavedCompositions
    ) -> None:
        self._saved = saved
        self.readers = AdapterReaders(saved, pool)
        self.line = RoomLine()
        self._registry = registry
        self._pool = pool
        # As long as one waits for a load, who comes later waits for the same.
        self._loads: dict[str, _Load] = {}
        # Its own pool: the disk or database may block it.
        self._collector = ThreadPoolExecutor(1, thread_name_prefix="collect")
        self._loop: asyncio.AbstractEventLoop | None = None
        self.make_room: Callable[[bool, Callable[[], object]], object] | None = None
        self._stop = Stop()
        self._parts: dict[str, frozenset[str]] = {}
        self._parts_lock = threading.Lock()
        # Also what was deleted while it was being loaded, and what a new upload replaced.
        registry.on_removed = self.forget

    @asynccontextmanager
    async def hold(
        self,
        adapter: str | Composition,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> AsyncIterator[Held | None]:
        """The adapter or composition, on the device until the block ends.

        None for a composition that is the base model. While it is not there yet, or its room is
        claimed, this is within `waiting`. Raises AdapterNotFound (with near names),
        InvalidComposition, UnsupportedAdapter for parts that do not compose,
        AdapterCapacityError, QueueFull for a merge, what `waiting` does, and what `fail_waiters`
        was told.
        """
        wanted = self._saved.resolve(adapter) if isinstance(adapter, str) else adapter
        if wanted.is_base:
            yield None
            return
        self._loop = asyncio.get_running_loop()
        async with AsyncExitStack() as stack:
            leases = [await stack.enter_async_context(self._lease(p)) for p in wanted.parts]
            digests = [lease.version.digest for lease in leases]
            version = wanted.digest(digests)
            self._remember(version, digests)
            if (resident := self._resident(version)) is None:
                read = partial(self.readers.read, wanted, digests)
                with waiting():
                    async with self._stop.heeded():
                        resident = await self._bring(version, wanted, read)
            try:
                # Again: while it waited for room, nobody knew of it.
                self._remember(version, digests)
                chat = None if wanted.alone is None else leases[0].version.chat
                yield Held(wanted, version, resident, chat)
            finally:
                self._pool.release(resident)
                self.line.announce()

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
        """Bring no more: whoever waits for an adapter, now or later, gets this error at once."""
        self._stop.call(why)

    def close(self) -> None:
        """Read no more."""
        self.readers.close()

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
                self._collector.submit(self._registry.collect, lease.version.digest)

    def _remember(self, version: str, digests: Sequence[str]) -> None:
        """Note what a composition was made of; those that left the device are forgotten."""
        if version in digests:
            return
        known = {*self._pool.resident_digests(), *self._loads}
        with self._parts_lock:
            if version not in self._parts:
                self._parts = {c: parts for c, parts in self._parts.items() if c in known}
                self._parts[version] = frozenset(digests)

    def _resident(self, digest: str) -> ResidentAdapter | None:
        """Leased, if it is on the device and nobody claims its room."""
        return None if digest in self.line.claimed else self._pool.lease(digest)

    async def _bring(self, digest: str, wanted: Composition, read: _Read) -> ResidentAdapter:
        load = self._loads.setdefault(digest, _Load())
        load.num_waiting += 1
        try:
            async with load.turn:
                if (refusal := load.refusals.get(wanted)) is not None:
                    raise refusal
                return await self._load(digest, read, is_merge=wanted.merge is not None)
        except AdapterError as error:
            load.refusals[wanted] = error
            raise
        finally:
            load.num_waiting -= 1
            if not load.num_waiting:
                load.refusals.clear()
                del self._loads[digest]

    async def _load(self, digest: str, read: _Read, *, is_merge: bool) -> ResidentAdapter:
        while digest in self.line.claimed and self._pool.is_resident(digest):
            await self.line.until_unclaimed()
        if (adapter := self._pool.lease(digest)) is not None:
            return adapter
        if not is_merge:
            return await self._find_room(digest, read)
        async with self.readers.merging():
            merged = await read()
            return await self._find_room(digest, partial(_given, merged))

    async def _find_room(self, digest: str, read: _Read) -> ResidentAdapter:
        if not self.line.waiting:
            adapter = await self._admit(digest, await read())
            if adapter is not None:
                return adapter
        # What was read is gone: a line of those who keep theirs would fill the memory.
        async with self.line.first():
            return await self._find_room_first(digest, read)

    async def _find_room_first(self, digest: str, read: _Read) -> ResidentAdapter:
        incoming: Incoming | None = None
        while True:
            self.line.look()
            if (adapter := self._pool.lease(digest)) is not None:
                return adapter
            if incoming is None:
                incoming = await read()
            if (adapter := await self._admit(digest, incoming)) is not None:
                return adapter
            self._ask_for_room()
            if self.line.may_claim:
                claim = partial(self._pool.claim, incoming, self.line.claimed)
                self.line.claim(await asyncio.to_thread(claim))
            await self.line.wait()

    async def _admit(self, digest: str, incoming: Incoming) -> ResidentAdapter | None:
        """On the device; None if all room is leased."""
        try:
            return await _acquire(lambda: self._pool.bring(digest, incoming), self._undo_admission)
        except Exception:
            self.line.announce()  # the room that it had taken
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
            self._loop.call_soon_threadsafe(self.line.announce)


async def _given(incoming: Incoming) -> Incoming:
    return incoming


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
