"""Where adapters live on the device: slabs of slots, evicted least recently used.

A *slab* holds up to `SLAB_SLOTS` adapters of one signature (the padded rank of
every projection group), stacked so that neighbouring slots are one view:

    a[group]: [num_slots, rank, in]      b[group]: [num_slots, rank, out]

and the other terms likewise. Nothing about ranks or target modules is fixed at
start: a slab is made for the first adapter of a signature, and goes with its last.
"""

import threading
from collections.abc import Collection, Sequence
from itertools import count

import torch

from dynamic_lora_adapters.device.eviction import Wanted, order_of_claim
from dynamic_lora_adapters.device.groups import ProjectionGroup, probe_shape
from dynamic_lora_adapters.device.incoming import Incoming, Reckoner
from dynamic_lora_adapters.device.pool_stats import PoolStats
from dynamic_lora_adapters.device.populate import populate_soon
from dynamic_lora_adapters.device.slab import ResidentAdapter, Slab
from dynamic_lora_adapters.device.slab_layout import SlabKind, SlabLayout
from dynamic_lora_adapters.device.slack import cut_slack
from dynamic_lora_adapters.device.upload import upload_for
from dynamic_lora_adapters.errors import AdapterCapacityError
from dynamic_lora_adapters.kernels.factor_layout import FactorLayout
from dynamic_lora_adapters.rows import RowTerms
from dynamic_lora_adapters.terms import AdapterTerms
from dynamic_lora_adapters.threads import single_threaded

SLAB_SLOTS = 8
SHORT_DTYPES = (torch.bfloat16, torch.float16)
"""What factors are kept in beside float32: the first of these that holds them without loss."""


class AdapterPool:
    """Device memory for adapters, within `budget_bytes`. Safe to call from any thread.

    Only adapters that are neither leased nor pinned are evicted, the least
    recently used first. A new slab has `slab_slots` places where the budget allows, and
    gives up those that nobody has reached before anybody is evicted. `reckoner` sizes adapters.
    Low-rank factors are kept in `factor_dtype`, by default in `dtype`, as everything else is,
    and laid out by `layout`, of which TILES are for bfloat16 beside float32. With `shortens`,
    factors that one of SHORT_DTYPES holds without loss are kept in that. With `merges`, terms
    that `dtype` rounds are also kept in float32 in host memory, which counts if it is the device's.
    """

    def __init__(
        self,
        groups: Sequence[ProjectionGroup],
        *,
        budget_bytes: int,
        device: torch.device,
        dtype: torch.dtype,
        factor_dtype: torch.dtype | None = None,
        layout: FactorLayout = FactorLayout.ROWS,
        shortens: bool = False,
        slab_slots: int = SLAB_SLOTS,
        merges: bool = False,
    ) -> None:
        self._groups = list(groups)
        self._budget_bytes = budget_bytes
        self._device = device
        self._on_host = device.type == "cpu"
        self._dtype = dtype

        layouts = [
            SlabLayout(
                self._groups,
                device=device,
                dtype=dtype,
                factor_dtype=kept_in,
                layout=layout,
                num_slots=slab_slots,
            )
            for kept_in in (*(SHORT_DTYPES if shortens else ()), factor_dtype or dtype)
        ]
        self._layout = layouts[-1]
        self.reckoner = Reckoner(groups, layouts, device=device, dtype=dtype, merges=merges)
        self._upload = upload_for(device)
        self._lock = threading.Lock()
        self._resident: dict[str, ResidentAdapter] = {}
        self._slabs: list[Slab] = []
        # The slab that the next adapter of a shape gets whose slots are all taken.
        self._spare: Slab | None = None
        self._num_loads = self._num_evictions = 0
        self._clock, self._slab_numbers = count(), count()
        self._probe_bytes = self._layout.slot_bytes(tuple(map(probe_shape, self._groups)))

    @property
    def factor_dtype(self) -> torch.dtype:
        """What low-rank factors are kept in, if not shortened."""
        return self._layout.factor_dtype

    def lease(self, digest: str) -> ResidentAdapter | None:
        """Lease the adapter if it is resident, else return None."""
        with self._lock:
            adapter = self._resident.get(digest)
            return None if adapter is None else self._lease(adapter)

    def admit(self, digest: str, terms: AdapterTerms) -> ResidentAdapter | None:
        """`prepare` and `bring` at once."""
        return self.bring(digest, self.prepare(terms))

    @single_threaded()
    def prepare(self, terms: AdapterTerms) -> Incoming:
        """Reckon what an adapter takes; nothing is brought to the device yet.

        Raises AdapterCapacityError if it would not fit into an empty pool.
        """
        incoming = self.reckoner.reckon(terms)
        if incoming.num_bytes > self._budget_bytes:
            raise AdapterCapacityError(
                f"The adapter needs {incoming.num_bytes} bytes on the device; adapters may use "
                f"{self._budget_bytes} in all.",
                fix="Start the server with a larger --adapter-memory.",
            )
        return incoming

    @single_threaded()
    def bring(self, digest: str, incoming: Incoming) -> ResidentAdapter | None:
        """Bring an adapter on to the device and lease it.

        Evicts others as needed; returns None when there is no room because
        all that could go is leased.
        """
        kind = incoming.kind
        with self._lock:
            if (known := self._resident.get(digest)) is not None:
                return self._lease(known)
            if (place := self._make_room(kind, incoming.own_bytes)) is None:
                return None
            slab, slot = place
            adapter = ResidentAdapter(
                digest,
                slab,
                slot,
                own_bytes=incoming.own_bytes,
                invocation_ids=incoming.terms.invocation_ids,
                mergeable=incoming.mergeable,
                size=kind.slot_bytes / max(self._probe_bytes, 1),
                last_used=next(self._clock),
            )
            slab.tenants[slot] = adapter
        try:
            self._fill(adapter, incoming)
        except BaseException:
            with self._lock:
                self._vacate(adapter)
            raise
        with self._lock:
            if (known := self._resident.get(digest)) is not None:
                self._vacate(adapter)
                return self._lease(known)
            if not adapter.doomed:
                self._resident[digest] = adapter
            self._num_loads += 1
            self._lease(adapter)
        self._prepare_next(kind)
        return adapter

    def claim(self, incoming: Incoming, held: Collection[str] = ()) -> frozenset[str]:
        """Digests of the adapters, maybe in use, that must leave for another; none needlessly.

        Those that are `held` already come first.
        """
        with self._lock:
            free = self._budget_bytes - self._used_bytes() - incoming.own_bytes
            wanted = Wanted(incoming.kind, free, self._free_place(incoming.kind) is not None)
            order = order_of_claim(self._tenants(), held=held, idle=self._idle())
            return frozenset(one.digest for one in wanted.victims(order))

    def _fill(self, adapter: ResidentAdapter, incoming: Incoming) -> None:
        """Write a slot that nobody else knows of: others need not wait for it."""
        adapter.rows = RowTerms.of(incoming.terms, device=self._device, dtype=self._dtype)
        sources = incoming.sources(self._dtype)
        if incoming.keeps_exact:
            adapter.exact = [one.joined() for one in incoming.members]
            sources = [one.fitted(self._dtype) for one in adapter.exact]
        adapter.uploaded = self._upload.write(sources, adapter.slab.places(adapter.slot))

    def _prepare_next(self, kind: SlabKind) -> None:
        """Have the memory of the slot that the next adapter of this shape gets committed."""
        if not self._on_host:
            return
        with self._lock:
            slab, slot = self._free_place(kind) or self._spare_place(kind) or (None, 0)
            if slab is None or slot < slab.num_prepared:
                return
            slab.num_prepared = slot + 1

        def tables() -> list[torch.Tensor]:
            with self._lock:
                known = slab is self._spare or slab in self._slabs
                if not known or slab.tenants[slot : slot + 1] != [None]:
                    return []
            return [one for place in slab.places(slot) for one in place.tensors()]

        populate_soon(tables, given_up=lambda: slab.is_cut(slot))

    def share(self, adapter: ResidentAdapter) -> None:
        """One more lease of an adapter that is leased."""
        with self._lock:
            assert adapter.num_leases > 0, "an adapter without leases may be gone"
            adapter.num_leases += 1

    def release(self, adapter: ResidentAdapter) -> None:
        """Give one lease back; a doomed adapter leaves with its last lease."""
        with self._lock:
            assert adapter.num_leases > 0, "lease released twice"
            adapter.num_leases -= 1
            if adapter.doomed and not adapter.num_leases and not adapter.pinned:
                self._vacate(adapter)

    def pin(self, adapter: ResidentAdapter) -> bool:
        """Keep an adapter's slot beyond its last lease, until `unpin`; False if it has left."""
        with self._lock:
            adapter.pinned = adapter.slab.tenants[adapter.slot : adapter.slot + 1] == [adapter]
            return adapter.pinned

    def unpin(self, adapter: ResidentAdapter) -> None:
        """Undo `pin`; an adapter that was dropped meanwhile leaves with its last lease."""
        with self._lock:
            adapter.pinned = False
            if adapter.doomed and not adapter.num_leases:
                self._vacate(adapter)

    def drop(self, digest: str) -> None:
        """Free the adapter's memory now, or when its last lease ends."""
        with self._lock:
            adapter = self._resident.pop(digest, None)
            if adapter is None:
                # One that is being written leaves with the lease that it is written for.
                for tenant in self._tenants():
                    tenant.doomed |= tenant.digest == digest
                return
            adapter.doomed = True
            if not adapter.num_leases and not adapter.pinned:
                self._vacate(adapter)

    def is_resident(self, digest: str) -> bool:
        """Whether an adapter is on the device now."""
        return digest in self._resident

    def resident_digests(self) -> list[str]:
        """Adapters on the device now, in no order."""
        with self._lock:
            return list(self._resident)

    def stats(self) -> PoolStats:
        """Counts and sizes at this moment."""
        with self._lock:
            return PoolStats(
                num_resident=len(self._resident),
                num_leased=sum(a.num_leases > 0 for a in self._tenants()),
                used_bytes=self._used_bytes(),
                budget_bytes=self._budget_bytes,
                num_loads=self._num_loads,
                num_evictions=self._num_evictions,
            )

    def check_integrity(self) -> None:
        """Raise RuntimeError if slots, residents and the budget disagree."""
        with self._lock:
            for adapter in self._resident.values():
                if adapter.slab.tenants[adapter.slot] is not adapter:
                    raise RuntimeError(f"adapter {adapter.digest} does not hold its slot")
            ghosts = [a for a in self._tenants() if a.doomed and not a.num_leases and not a.pinned]
            if ghosts:
                raise RuntimeError(f"unleased doomed adapters remain: {ghosts}")
            if self._used_bytes() > self._budget_bytes:
                raise RuntimeError("adapters use more than their budget")
            if any(slab.empty for slab in self._slabs):
                raise RuntimeError("an empty slab was not given back")

    def _lease(self, adapter: ResidentAdapter) -> ResidentAdapter:
        adapter.num_leases += 1
        adapter.last_used = next(self._clock)
        return adapter

    def _tenants(self) -> list[ResidentAdapter]:
        return [t for slab in self._slabs for t in slab.tenants if t is not None]

    def _used_bytes(self) -> int:
        in_slabs = sum(slab.num_bytes for slab in self._slabs)
        return in_slabs + sum(tenant.own_bytes for tenant in self._tenants())

    def _make_room(self, kind: SlabKind, own_bytes: int) -> tuple[Slab, int] | None:
        while True:
            free = self._budget_bytes - self._used_bytes() - own_bytes
            place = self._free_place(kind)
            if free >= 0 and place is not None:
                return place
            if (num_slots := kind.num_slots_for(free)) >= 1:
                return self._add_slab(kind, num_slots), 0
            missing = (kind.slot_bytes if place is None else 0) - free
            if self._on_host and cut_slack(self._slabs, missing, place):
                continue
            victims = Wanted(kind, free, place is not None).victims(self._idle())
            if not victims:
                return None
            for victim in victims:
                self._evict(victim)

    def _add_slab(self, kind: SlabKind, num_slots: int) -> Slab:
        # The room that there was for the spare one goes to whatever is added.
        spare, self._spare = self._spare, None
        if spare is None or not kind.includes(spare) or len(spare.tenants) != num_slots:
            spare = kind.new_slab(next(self._slab_numbers), num_slots)
        self._slabs.append(spare)
        return spare

    def _free_place(self, kind: SlabKind) -> tuple[Slab, int] | None:
        for slab in self._slabs:
            if kind.includes(slab) and (slot := slab.free_slot()) is not None:
                return slab, slot
        return None

    def _spare_place(self, kind: SlabKind) -> tuple[Slab, int] | None:
        """The first slot of an empty slab for later, if the budget has room for that now."""
        if kind.is_large:
            return None
        if self._spare is None or not kind.includes(self._spare):
            num_slots = kind.num_slots_for(self._budget_bytes - self._used_bytes())
            if num_slots < 1:
                return None
            try:
                self._spare = kind.new_slab(next(self._slab_numbers), num_slots)
            except (MemoryError, RuntimeError):  # no harm yet: who needs it is told
                return None
        return self._spare, 0

    def _idle(self) -> list[ResidentAdapter]:
        by_use = sorted(self._resident.values(), key=lambda adapter: adapter.last_used)
        return [one for one in by_use if not one.num_leases and not one.pinned]

    def _evict(self, victim: ResidentAdapter) -> None:
        del self._resident[victim.digest]
        self._vacate(victim)
        self._num_evictions += 1

    def _vacate(self, adapter: ResidentAdapter) -> None:
        adapter.slab.tenants[adapter.slot] = None
        if adapter.slab.empty:
            self._slabs.remove(adapter.slab)
            if not self._slabs:
                self._spare = None
