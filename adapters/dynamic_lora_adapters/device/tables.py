"""Where adapters' factors lie, in tensors: what a captured step reads instead of slabs.

Slabs come and go with the adapters, and a captured step cannot follow them. It
reads the address and the rank of each adapter's factors from these tables,
which stay where they are; an adapter gets an entry before the first step that
needs it.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dynamic_lora_adapters.device.groups import GroupShape, ProjectionGroup
from dynamic_lora_adapters.device.slab import ResidentAdapter, Slab
from dynamic_lora_adapters.transfer import to_device

# Ranks of one layer that a captured step makes room for; larger ones run uncaptured.
MAX_RANK = 64
# Programs that walk over the tiles of a captured step, however many those are.
_PROGRAMS = 32
# Slabs whose refusals are remembered: more than there are at a time.
_MAX_KNOWN = 1024


class AddressTables:
    """Per group and entry: addresses of a and b, int64, and their rank, int32.

    Shapes [num_groups, num_entries]. A batch may hold as many adapters as
    there are entries; the entry used longest ago is given to a new one.
    """

    def __init__(
        self, groups: Sequence[ProjectionGroup], num_entries: int, device: torch.device
    ) -> None:
        shape = (len(groups), num_entries)
        self.a = torch.zeros(shape, dtype=torch.int64, device=device)
        self.b = torch.zeros(shape, dtype=torch.int64, device=device)
        self.ranks = torch.zeros(shape, dtype=torch.int32, device=device)
        self.max_ranks = tuple(MAX_RANK * len(group.paths) for group in groups)
        self.heads = frozenset(index for index, group in enumerate(groups) if group.is_head)
        self._free = list(reversed(range(num_entries)))
        # By slot, not by adapter: whoever sits in a slot, its addresses are the same.
        # Numbers of slabs are never used again.
        self._entries: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._refusals: dict[int, str | None] = {}

    def refusal(self, adapter: ResidentAdapter) -> str | None:
        """Why an adapter's deltas cannot be read from tables, or None if they can."""
        if adapter.rows is not None:
            return "terms on other modules"
        slab = adapter.slab
        # Asked of every adapter before every step, and a slab's shapes never change.
        if slab.number not in self._refusals:
            if len(self._refusals) >= _MAX_KNOWN:
                self._refusals.pop(next(iter(self._refusals)))
            self._refusals[slab.number] = self._slab_refusal(slab)
        return self._refusals[slab.number]

    def _slab_refusal(self, slab: Slab) -> str | None:
        if any(slab.signature[head] != GroupShape() for head in self.heads):
            return "terms on the output head"
        if slab.tiled:
            return "factors in tiles"
        for shape, limit in zip(slab.signature, self.max_ranks, strict=True):
            if shape.rank > limit:
                return "large rank"
            if shape != GroupShape(shape.rank):
                return "terms that are no factors"
        return None

    def merged_refusal(self, adapter: ResidentAdapter) -> str | None:
        """Why its own rows cannot do without it once it is merged, or None if they can.

        The head's weight is merged by reference, and a captured step keeps to the old one.
        """
        if adapter.rows is not None:
            return "terms on other modules"
        signature = adapter.slab.signature
        if any(shape.bias for shape in signature):
            return "terms that no weight holds"
        if any(signature[head] != GroupShape() for head in self.heads):
            return "a merged output head"
        return None

    def entries(self, adapters: Sequence[ResidentAdapter]) -> list[int]:
        """The entry of each adapter of a batch, made where it has none yet."""
        keys = [(adapter.slab.number, adapter.slot) for adapter in adapters]
        for key in keys:
            if key in self._entries:
                self._entries.move_to_end(key)
        for key, adapter in zip(keys, adapters, strict=True):
            if key not in self._entries:
                entry = self._free.pop() if self._free else self._entries.popitem(last=False)[1]
                self._entries[key] = entry
                self._write(entry, adapter.slab, adapter.slot)
        return [self._entries[key] for key in keys]

    def _write(self, entry: int, slab: Slab, slot: int) -> None:
        def addresses(tables: Sequence[torch.Tensor | None]) -> torch.Tensor:
            known = [0 if table is None else table[slot].data_ptr() for table in tables]
            return to_device(known, self.a.device)

        self.a[:, entry] = addresses(slab.a)
        self.b[:, entry] = addresses(slab.b)
        ranks = [shape.rank for shape in slab.signature]
        self.ranks[:, entry] = to_device(ranks, self.a.device, torch.int32)


@dataclass(frozen=True, slots=True)
class TableDeltas:
    """The deltas of a step of fixed shape: tables, and tiles that name their entries.

    `tiles` is what `tiles_of` gives for tiles of SHORT rows, in a tensor that
    has room for a tile a row.
    """

    tables: AddressTables
    tiles: torch.Tensor
    num_rows: int

    def add(self, index: int, out: torch.Tensor, x: torch.Tensor) -> None:
        """Add what group `index` gets for x [num_rows, in] to out [num_rows, out], in place.

        Nothing to the output head: adapters that change it are refused, for in nearly every
        step two launches as wide as the vocabulary would be for nothing.
        """
        if index in self.tables.heads:
            return
        from dynamic_lora_adapters.kernels.triton_segments import Factors, add_deltas

        tables = self.tables
        factors = Factors(
            a=tables.a[index],
            b=tables.b[index],
            ranks=tables.ranks[index],
            max_rank=tables.max_ranks[index],
        )
        add_deltas(out, x, factors, self.tiles, num_programs=min(self.num_rows, _PROGRAMS))
