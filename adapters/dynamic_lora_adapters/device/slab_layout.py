"""How slabs are laid out: what a slot of a shape takes, and new tables for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dynamic_lora_adapters.device.groups import ProjectionGroup
from dynamic_lora_adapters.device.slab import Signature, Slab
from dynamic_lora_adapters.kernels.factor_layout import FactorLayout


def _is_large(signature: Signature) -> bool:
    return any(shape.dense for shape in signature)


class SlabLayout:
    """Sizes and makes slabs for a model's groups, of `num_slots` slots where there is room.

    Low-rank factors are kept in `factor_dtype` and laid out by `layout`, everything else in
    `dtype`.
    """

    def __init__(
        self,
        groups: Sequence[ProjectionGroup],
        *,
        device: torch.device,
        dtype: torch.dtype,
        factor_dtype: torch.dtype,
        layout: FactorLayout,
        num_slots: int,
    ) -> None:
        assert layout is not FactorLayout.TILES or factor_dtype is torch.bfloat16
        assert (layout is FactorLayout.BYTES) == (factor_dtype is torch.uint8)
        self._groups = groups
        self._device = device
        self._dtype = dtype
        self._factor_dtype = factor_dtype
        self._layout = layout
        self._num_slots = num_slots
        self._at_once = device.type != "cpu"

    @property
    def factor_dtype(self) -> torch.dtype:
        """What low-rank factors are kept in."""
        return self._factor_dtype

    def slot_bytes(self, signature: Signature) -> int:
        """Bytes of one slot."""
        factors = others = 0
        for shape, group in zip(signature, self._groups, strict=True):
            ranks = self._layout.ranks(shape.rank)
            factors += ranks * (self._a_width(group) + self._b_width(group))
            others += (shape.scale + shape.bias) * group.out_features
            others += shape.dense * group.in_features * group.out_features
        return factors * self._factor_dtype.itemsize + others * self._dtype.itemsize

    def least_bytes(self, signature: Signature) -> int:
        """The fewest bytes in which a new slab gets a slot."""
        return max(self.slot_bytes(signature), 1)

    def num_slots_for(self, signature: Signature, free_bytes: int) -> int:
        """How many slots a new slab gets within `free_bytes`; 0 where there is no room for one.

        Where memory is taken at once, and for as long as there is the slab, other shapes are left
        half of the room.
        """
        possible = free_bytes // self.least_bytes(signature)
        wanted = 1 if _is_large(signature) else self._num_slots
        return min(possible, wanted, max(possible // 2, 1) if self._at_once else wanted)

    def new_slab(self, number: int, signature: Signature, num_slots: int) -> Slab:
        """Empty tables; their memory is not committed before it is written."""

        def table(*sizes: int, dtype: torch.dtype = self._dtype) -> torch.Tensor:
            return torch.empty(num_slots, *sizes, device=self._device, dtype=dtype)

        def factors(rank: int, width: int) -> torch.Tensor:
            return table(rank, width, dtype=self._factor_dtype)

        slab = Slab(
            number=number,
            signature=signature,
            a=[],
            b=[],
            num_bytes=self.slot_bytes(signature) * num_slots,
            tenants=[None] * num_slots,
            factor_dtype=self._factor_dtype,
            mixed=self._factor_dtype != self._dtype,
            tiled=self._layout.tiled,
        )
        for index, (shape, group) in enumerate(zip(signature, self._groups, strict=True)):
            rank = self._layout.ranks(shape.rank)
            slab.a.append(factors(rank, self._a_width(group)) if rank else None)
            b = factors(rank, self._b_width(group))
            whole = b if slab.tiled else b[:, :, : group.out_features]
            slab.b.append(whole if rank else None)
            # Read by kernels on the host alone.
            reach = torch.zeros(num_slots, rank, 2, dtype=torch.long)
            slab.columns.append(reach if rank else None)
            if shape.scale:
                slab.scale[index] = table(group.out_features)
            if shape.dense:
                slab.dense[index] = table(group.out_features, group.in_features)
            if shape.bias:
                slab.bias[index] = table(group.out_features)
        return slab

    def _a_width(self, group: ProjectionGroup) -> int:
        return self._layout.a_width(group.in_features)

    def _b_width(self, group: ProjectionGroup) -> int:
        return self._layout.b_width(group.out_features, self._factor_dtype.itemsize)


@dataclass(frozen=True, slots=True)
class SlabKind:
    """The slabs that can hold an adapter: of its signature, with factors laid out as its own."""

    signature: Signature
    layout: SlabLayout

    @property
    def is_large(self) -> bool:
        """Whether there is a dense term, as large as its layer: no room is taken in advance."""
        return _is_large(self.signature)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return self.layout.slot_bytes(self.signature)

    @property
    def least_bytes(self) -> int:
        """The fewest bytes in which a new slab gets a slot."""
        return self.layout.least_bytes(self.signature)

    def num_slots_for(self, free_bytes: int) -> int:
        """How many slots a new slab gets within `free_bytes`; 0 where there is no room for one."""
        return self.layout.num_slots_for(self.signature, free_bytes)

    def new_slab(self, number: int, num_slots: int) -> Slab:
        """Empty tables; their memory is not committed before it is written."""
        return self.layout.new_slab(number, self.signature, num_slots)

    def includes(self, slab: Slab) -> bool:
        """Whether a slab is one of these."""
        ours = self.signature, self.layout.factor_dtype
        return (slab.signature, slab.factor_dtype) == ours
