"""Brings adapters to the device for requests, without blocking the event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from dynamic_lora_adapters.registry import AdapterRegistry, Lease
from dynamic_lora_adapters.slots import AdapterPool, ResidentAdapter

T = TypeVar("T")


class Residency:
    """Pairs the registry (what exists) with the pool (what is on the device).

    A request holds two leases from admission to its end: one on the version in
    the store, one on the slot. Several requests for one cold adapter share one
    load; a request that finds all room leased waits until a lease ends.
    """

    def __init__(self, registry: AdapterRegistry, pool: AdapterPool) -> None:
        self._registry = registry
        self._pool = pool
        self._loads: dict[str, asyncio.Lock] = {}
        self._released = asyncio.Condition()
        self._num_releases = 0

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[tuple[Lease, ResidentAdapter]]:
        """The named adapter, on the device until the block ends.

        Raises AdapterNotFound (with near names) and AdapterCapacityError.
        """
        lease = await _acquire(lambda: self._registry.lease(name), self._registry.release)
        try:
            adapter = await self._bring(lease.version.digest)
            try:
                yield lease, adapter
            finally:
                self._pool.release(adapter)
                await self._announce_release()
        finally:
            await asyncio.shield(asyncio.to_thread(self._registry.release, lease))

    def forget(self, digest: str) -> None:
        """Free the device memory of a deleted version, at once or after its last request."""
        self._pool.drop(digest)

    async def _bring(self, digest: str) -> ResidentAdapter:
        while True:
            seen = self._num_releases
            if (adapter := self._pool.lease(digest)) is not None:
                return adapter
            async with self._loads.setdefault(digest, asyncio.Lock()):
                adapter = await self._load(digest)
            if adapter is not None:
                return adapter
            async with self._released:
                while self._num_releases == seen:
                    await self._released.wait()

    async def _load(self, digest: str) -> ResidentAdapter | None:
        """Read and admit; None if all room is leased. The caller holds the load's lock."""
        try:
            if (adapter := self._pool.lease(digest)) is not None:
                return adapter
            factors = await asyncio.to_thread(self._registry.load, digest)
            return await _acquire(
                lambda: self._pool.admit(digest, factors),
                lambda admitted: None if admitted is None else self._pool.release(admitted),
            )
        finally:
            self._loads.pop(digest, None)

    async def _announce_release(self) -> None:
        async with self._released:
            self._num_releases += 1
            self._released.notify_all()


async def _acquire(acquire: Callable[[], T], undo: Callable[[T], object]) -> T:
    """Run `acquire` in a thread; if the caller is cancelled meanwhile, undo it when it is done."""
    task = asyncio.ensure_future(asyncio.to_thread(acquire))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(
            lambda done: None if done.cancelled() or done.exception() else undo(done.result())
        )
        raise
