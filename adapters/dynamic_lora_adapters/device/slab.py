"""Tables that hold several adapters of one shape side by side, and the adapters in them."""

from dataclasses import dataclass, field

import torch

from dynamic_lora_adapters.device.groups import GroupShape, GroupTerms
from dynamic_lora_adapters.kernels.base import SlotFactors
from dynamic_lora_adapters.kernels.native_segments import FACTOR_FORMATS
from dynamic_lora_adapters.rows import RowTerms

Signature = tuple[GroupShape, ...]


@dataclass(slots=True, eq=False)
class Slab:
    """Stacked terms of adapters that share a signature; `number` orders slabs by age.

    `columns` [num_slots, rank, 2] is where rows of b are not zero.
    `scale` and `bias` [num_slots, out] and `dense` [num_slots, out, in] have
    entries for the groups whose signature says so. The memory of the first `num_prepared`
    slots was asked to be committed. Factors are in `factor_dtype`, and in tiles if they are
    `tiled`; if that is `mixed`, another dtype than inputs have, C++ alone reads them.
    """

    number: int
    signature: Signature
    a: list[torch.Tensor | None]
    b: list[torch.Tensor | None]
    num_bytes: int
    tenants: list["ResidentAdapter | None"]
    columns: list[torch.Tensor | None] = field(default_factory=list)
    scale: dict[int, torch.Tensor] = field(default_factory=dict)
    dense: dict[int, torch.Tensor] = field(default_factory=dict)
    bias: dict[int, torch.Tensor] = field(default_factory=dict)
    num_prepared: int = 0
    factor_dtype: torch.dtype = torch.float32
    mixed: bool = False
    tiled: bool = False
    _factors: dict[tuple[int, int, int], SlotFactors | None] = field(default_factory=dict)
    _addresses: torch.Tensor | None = None

    @property
    def low_rank(self) -> bool:
        """Whether there are no terms but the factors."""
        return not (self.scale or self.dense or self.bias)

    def acts_on(self, group: int) -> bool:
        """Whether its adapters have any terms for a group."""
        others = self.scale, self.dense, self.bias
        return self.a[group] is not None or any(group in terms for terms in others)

    def addresses(self) -> torch.Tensor:
        """Where slot 0's factors lie: [num_groups, 7], int64, made once.

        Addresses of a, b and columns, the rank, how far rows of b are apart, the format of
        factors, and whether they are in tiles; 0 where a group has none.
        """
        if self._addresses is None:
            tables = zip(self.a, self.b, self.columns, strict=True)
            self._addresses = torch.tensor(
                [
                    [0] * 7
                    if a is None or b is None or columns is None
                    else [
                        a.data_ptr(),
                        b.data_ptr(),
                        columns.data_ptr(),
                        a.shape[1],
                        b.stride(1),
                        FACTOR_FORMATS[a.dtype],
                        self.tiled,
                    ]
                    for a, b, columns in tables
                ]
            )
        return self._addresses

    def free_slot(self) -> int | None:
        """Lowest empty slot, or None."""
        return next((i for i, tenant in enumerate(self.tenants) if tenant is None), None)

    def factors(self, group: int, slots: slice) -> SlotFactors | None:
        """Views of neighbouring slots' factors for a group; made once, as steps ask for them."""
        key = group, slots.start, slots.stop
        if key not in self._factors:
            a, b = self.a[group], self.b[group]
            columns = self.columns[group] if self.columns else None
            self._factors[key] = None
            if a is not None and b is not None:
                within = None if columns is None else columns[slots]
                self._factors[key] = SlotFactors(a[slots], b[slots], within, self.tiled)
        return self._factors[key]

    def terms(self, group: int, slot: int) -> GroupTerms:
        """Views of what a slot holds for a group."""
        a, b = self.a[group], self.b[group]
        columns = self.columns[group] if self.columns else None
        return GroupTerms(
            a=None if a is None else a[slot],
            b=None if b is None else b[slot],
            columns=None if columns is None else columns[slot],
            scale=self.scale[group][slot] if group in self.scale else None,
            dense=self.dense[group][slot] if group in self.dense else None,
            bias=self.bias[group][slot] if group in self.bias else None,
            tiled=self.tiled,
        )

    def places(self, slot: int) -> list[GroupTerms]:
        """The same for every group."""
        return [self.terms(group, slot) for group in range(len(self.signature))]

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return self.num_bytes // len(self.tenants)

    @property
    def num_reached(self) -> int:
        """How many slots there are up to the last that has an adapter."""
        return max(
            (i + 1 for i, tenant in enumerate(self.tenants) if tenant is not None), default=0
        )

    def cut(self, num_slots: int) -> None:
        """Give up the slots behind the first so many, which are empty; tables stay."""
        self.num_bytes = self.slot_bytes * num_slots
        del self.tenants[num_slots:]
        self.num_prepared = min(self.num_prepared, num_slots)

    def is_cut(self, slot: int) -> bool:
        """Whether a slot was given up: nothing comes to lie there again."""
        return slot >= len(self.tenants)

    @property
    def num_taken(self) -> int:
        """How many slots have an adapter."""
        return sum(tenant is not None for tenant in self.tenants)

    @property
    def empty(self) -> bool:
        return not self.num_taken


@dataclass(slots=True, eq=False)
class ResidentAdapter:
    """An adapter that occupies a slot. `num_leases` requests rely on it being there.

    `rows` is what it does besides terms on linear layers, `own_bytes` what the budget counts
    beside its slot, `invocation_ids` the tokens from which on it acts. It is `mergeable` if it
    acts on every token, has anything that weights can hold, and can be undone for other rows, as
    far as is known. `exact` holds its terms in float32 where the slot's are rounded to a shorter
    dtype and merges need them. `size` is what its slot takes, as a multiple of an adapter of
    `groups.PROBE_RANK` on every layer. The slot may be read once `uploaded`, if there is such an
    event, has come to pass.
    """

    digest: str
    slab: Slab
    slot: int
    rows: RowTerms | None = None
    own_bytes: int = 0
    invocation_ids: tuple[int, ...] = ()
    mergeable: bool = True
    size: float = 1.0
    exact: list[GroupTerms] | None = None
    uploaded: torch.cuda.Event | None = None
    num_leases: int = 0
    last_used: int = 0
    doomed: bool = False
    pinned: bool = False

    def await_upload(self) -> None:
        """Have the current stream wait for the slot's content. The engine's thread calls this."""
        if self.uploaded is not None:
            self.uploaded.wait()
            self.uploaded = None
