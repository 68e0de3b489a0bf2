"""Where adapters live on the device: slabs of slots, evicted least recently used.

A *slab* holds up to `SLAB_SLOTS` adapters of one signature (the padded rank of
every projection group), stacked so that neighbouring slots are one view:

    a[group]: [num_slots, rank, in]      b[group]: [num_slots, rank, out]

Nothing about ranks or target modules is fixed at start: a slab is made when
an adapter of a new signature arrives, and given back when its last leaves.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch

from dynamic_lora_adapters.errors import AdapterCapacityError
from dynamic_lora_adapters.groups import GroupFactors, ProjectionGroup, group_factors
from dynamic_lora_adapters.threads import single_threaded
from dynamic_lora_adapters.weights import LoraFactors

SLAB_SLOTS = 8
Signature = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Slab:
    """Stacked factors of adapters that share a signature; `number` orders slabs by age."""

    number: int
    signature: Signature
    a: list[torch.Tensor | None]
    b: list[torch.Tensor | None]
    num_bytes: int
    tenants: list["ResidentAdapter | None"]

    def free_slot(self) -> int | None:
        """Lowest empty slot, or None."""
        return next((i for i, tenant in enumerate(self.tenants) if tenant is None), None)

    @property
    def empty(self) -> bool:
        return all(tenant is None for tenant in self.tenants)


@dataclass(slots=True, eq=False)
class ResidentAdapter:
    """An adapter that occupies a slot. `num_leases` requests rely on it being there."""

    digest: str
    slab: Slab
    slot: int
    num_leases: int = 0
    last_used: int = 0
    doomed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """A snapshot of the pool, sizes in bytes."""

    num_resident: int
    num_leased: int
    used_bytes: int
    budget_bytes: int
    num_loads: int
    num_evictions: int


@dataclass(slots=True)
class _Counters:
    loads: int = 0
    evictions: int = 0
    clock: "count[int]" = field(default_factory=count)
    slabs: "count[int]" = field(default_factory=count)


class AdapterPool:
    """Device memory for adapters, within `budget_bytes`. Safe to call from any thread.

    A lease pins an adapter; only adapters without leases are evicted, the
    least recently used first.
    """

    def __init__(
        self,
        groups: Sequence[ProjectionGroup],
        *,
        budget_bytes: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._groups = list(groups)
        self._budget_bytes = budget_bytes
        self._device = device
        self._dtype = dtype
        self._lock = threading.Lock()
        self._resident: dict[str, ResidentAdapter] = {}
        self._slabs: list[Slab] = []
        self._counters = _Counters()

    def lease(self, digest: str) -> ResidentAdapter | None:
        """Pin the adapter if it is resident, else return None."""
        with self._lock:
            adapter = self._resident.get(digest)
            return None if adapter is None else self._pin(adapter)

    @single_threaded()
    def admit(self, digest: str, factors: Mapping[str, LoraFactors]) -> ResidentAdapter | None:
        """Bring an adapter on to the device and pin it.

        Evicts others as needed; returns None when there is no room because
        all that could go is leased. Raises AdapterCapacityError if it would
        not fit into an empty pool.
        """
        stacked = group_factors(self._groups, factors)
        signature = tuple(0 if g is None else g.rank for g in stacked)
        slot_bytes = self._slot_bytes(signature)
        if slot_bytes > self._budget_bytes:
            raise AdapterCapacityError(
                f"The adapter needs {slot_bytes} bytes on the device; adapters may use "
                f"{self._budget_bytes} in all.",
                fix="Start the server with a larger --adapter-memory.",
            )
        with self._lock:
            if (known := self._resident.get(digest)) is not None:
                return self._pin(known)
            place = self._make_room(signature, slot_bytes)
            if place is None:
                return None
            slab, slot = place
            _write(slab, slot, stacked)
            adapter = ResidentAdapter(digest, slab, slot)
            slab.tenants[slot] = adapter
            self._resident[digest] = adapter
            self._counters.loads += 1
            return self._pin(adapter)

    def release(self, adapter: ResidentAdapter) -> None:
        """Give one lease back; a doomed adapter leaves with its last lease."""
        with self._lock:
            assert adapter.num_leases > 0, "lease released twice"
            adapter.num_leases -= 1
            if adapter.doomed and not adapter.num_leases:
                self._vacate(adapter)

    def drop(self, digest: str) -> None:
        """Free the adapter's memory now, or when its last lease ends."""
        with self._lock:
            adapter = self._resident.pop(digest, None)
            if adapter is None:
                return
            adapter.doomed = True
            if not adapter.num_leases:
                self._vacate(adapter)

    def resident_digests(self) -> list[str]:
        """Adapters on the device now, least recently used first."""
        with self._lock:
            by_use = sorted(self._resident.values(), key=lambda adapter: adapter.last_used)
            return [adapter.digest for adapter in by_use]

    def stats(self) -> PoolStats:
        """Counts and sizes at this moment."""
        with self._lock:
            return PoolStats(
                num_resident=len(self._resident),
                num_leased=sum(a.num_leases > 0 for a in self._tenants()),
                used_bytes=self._used_bytes(),
                budget_bytes=self._budget_bytes,
                num_loads=self._counters.loads,
                num_evictions=self._counters.evictions,
            )

    def check_integrity(self) -> None:
        """Raise RuntimeError if slots, residents and the budget disagree."""
        with self._lock:
            for adapter in self._resident.values():
                if adapter.slab.tenants[adapter.slot] is not adapter:
                    raise RuntimeError(f"adapter {adapter.digest} does not hold its slot")
            ghosts = [a for a in self._tenants() if a.doomed and not a.num_leases]
            if ghosts:
                raise RuntimeError(f"unleased doomed adapters remain: {ghosts}")
            if self._used_bytes() > self._budget_bytes:
                raise RuntimeError("adapters use more than their budget")
            if any(slab.empty for slab in self._slabs):
                raise RuntimeError("an empty slab was not given back")

    def _pin(self, adapter: ResidentAdapter) -> ResidentAdapter:
        adapter.num_leases += 1
        adapter.last_used = next(self._counters.clock)
        return adapter

    def _tenants(self) -> list[ResidentAdapter]:
        return [t for slab in self._slabs for t in slab.tenants if t is not None]

    def _used_bytes(self) -> int:
        return sum(slab.num_bytes for slab in self._slabs)

    def _slot_bytes(self, signature: Signature) -> int:
        per_rank = (g.in_features + g.out_features for g in self._groups)
        elements = sum(rank * size for rank, size in zip(signature, per_rank, strict=True))
        return elements * self._dtype.itemsize

    def _make_room(self, signature: Signature, slot_bytes: int) -> tuple[Slab, int] | None:
        while True:
            for slab in self._slabs:
                if slab.signature == signature and (slot := slab.free_slot()) is not None:
                    return slab, slot
            room = (self._budget_bytes - self._used_bytes()) // max(slot_bytes, 1)
            if room >= 1:
                slab = self._new_slab(signature, slot_bytes, min(room, SLAB_SLOTS))
                return slab, 0
            if not self._evict_one():
                return None

    def _evict_one(self) -> bool:
        idle = [a for a in self._resident.values() if not a.num_leases]
        if not idle:
            return False
        victim = min(idle, key=lambda adapter: adapter.last_used)
        del self._resident[victim.digest]
        self._vacate(victim)
        self._counters.evictions += 1
        return True

    def _vacate(self, adapter: ResidentAdapter) -> None:
        adapter.slab.tenants[adapter.slot] = None
        if adapter.slab.empty:
            self._slabs.remove(adapter.slab)

    def _new_slab(self, signature: Signature, slot_bytes: int, num_slots: int) -> Slab:
        def table(rank: int, width: int) -> torch.Tensor | None:
            if not rank:
                return None
            return torch.empty(num_slots, rank, width, device=self._device, dtype=self._dtype)

        pairs = list(zip(signature, self._groups, strict=True))
        slab = Slab(
            number=next(self._counters.slabs),
            signature=signature,
            a=[table(rank, group.in_features) for rank, group in pairs],
            b=[table(rank, group.out_features) for rank, group in pairs],
            num_bytes=slot_bytes * num_slots,
            tenants=[None] * num_slots,
        )
        self._slabs.append(slab)
        return slab


def _write(slab: Slab, slot: int, stacked: Sequence[GroupFactors | None]) -> None:
    for a, b, factors in zip(slab.a, slab.b, stacked, strict=True):
        if factors is not None:
            assert a is not None and b is not None
            a[slot].copy_(factors.a)
            b[slot].copy_(factors.b)
