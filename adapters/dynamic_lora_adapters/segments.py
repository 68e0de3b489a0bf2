"""Which rows of a batch belong to which adapter slot, computed once per step."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

import torch

from dynamic_lora_adapters.tiles import tiles_of
from dynamic_lora_adapters.transfer import to_device

if TYPE_CHECKING:
    from dynamic_lora_adapters.device.slab import ResidentAdapter, Slab
    from dynamic_lora_adapters.kernels.base import DeltaKernel


class Effect(Enum):
    """What a run does to its rows.

    APPLY adds all terms. While an adapter is merged, REST adds to its own rows
    the terms that no weight can hold, and UNDO takes from all other rows what
    its weights added.
    """

    APPLY = auto()
    REST = auto()
    UNDO = auto()


@dataclass(slots=True)
class Run:
    """Neighbouring rows served by neighbouring slots of one slab.

    Rows `row_start:row_stop` of the batch are cut into segments, one per slot
    `slot_start, slot_start + 1, ...`; segment i holds `lengths[i]` rows. The
    index tensors that kernels derive from the lengths are made on first use
    and shared by all layers of the step.
    """

    slab: "Slab"
    slot_start: int
    row_start: int
    lengths: list[int]
    kernel: "DeltaKernel | None" = None
    effect: Effect = Effect.APPLY
    num_rows: int = field(init=False)
    _pad: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, repr=False)
    _owner: torch.Tensor | None = field(default=None, repr=False)
    _lengths: torch.Tensor | None = field(default=None, repr=False)
    _ends: torch.Tensor | None = field(default=None, repr=False)
    _tiles: torch.Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.num_rows = sum(self.lengths)

    def extend(self, num_rows: int, *, next_slot: bool) -> None:
        """Add rows behind the last: of its slot, or of the next one."""
        if next_slot:
            self.lengths.append(num_rows)
        else:
            self.lengths[-1] += num_rows
        self.num_rows += num_rows

    @property
    def sign(self) -> float:
        """The factor on what a kernel adds."""
        return -1.0 if self.effect is Effect.UNDO else 1.0

    @property
    def num_slots(self) -> int:
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    @property
    def uniform(self) -> bool:
        """Whether all segments have the same length, so that a view can replace padding."""
        return min(self.lengths) == max(self.lengths)

    @property
    def rows(self) -> slice:
        return slice(self.row_start, self.row_start + self.num_rows)

    @property
    def slots(self) -> slice:
        return slice(self.slot_start, self.slot_start + self.num_slots)

    def lengths_tensor(self) -> torch.Tensor:
        """`lengths` as int64 in host memory, for kernels that read them by address."""
        if self._lengths is None:
            self._lengths = torch.tensor(self.lengths)
        return self._lengths

    def padding(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices between packed rows and a padded [num_slots, max_length] grid.

        Returns `(gather, scatter)`: `gather` [num_slots * max_length] names the
        packed row that fills each cell (a cell without a row repeats the
        segment's first), `scatter` [num_rows] the cell of each packed row.
        """
        if self._pad is None:
            lengths = torch.tensor(self.lengths)
            starts = lengths.cumsum(0) - lengths
            column = torch.arange(self.max_length)
            inside = column < lengths[:, None]
            gather = (starts[:, None] + torch.where(inside, column, 0)).reshape(-1)
            scatter = inside.reshape(-1).nonzero().squeeze(1)
            self._pad = to_device(gather, device), to_device(scatter, device)
        return self._pad

    def owner(self, device: torch.device) -> torch.Tensor:
        """Segment number of every row, shape [num_rows]."""
        if self._owner is None:
            lengths = torch.tensor(self.lengths)
            owner = torch.repeat_interleave(torch.arange(self.num_slots), lengths)
            self._owner = to_device(owner, device)
        return self._owner

    def ends(self, device: torch.device) -> torch.Tensor:
        """The row after each segment's last, shape [num_slots], int32."""
        if self._ends is None:
            ends = torch.tensor(self.lengths).cumsum(0, dtype=torch.int32)
            self._ends = to_device(ends, device)
        return self._ends

    def tiles(self, num_rows: int, device: torch.device) -> torch.Tensor:
        """The segments in tiles of up to `num_rows` rows, int32; laid out as `tiles_of` says."""
        if self._tiles is None:
            tiles = tiles_of(enumerate(self.lengths), num_rows)
            self._tiles = to_device(tiles, device, torch.int32)
        return self._tiles


@dataclass(frozen=True, slots=True)
class DeltaPlan:
    """The runs of one step. Rows outside every run are base rows and get no delta."""

    runs: tuple[Run, ...]

    @classmethod
    def of(
        cls,
        rows: Iterable[tuple["ResidentAdapter | None", int]],
        merged: "ResidentAdapter | None" = None,
    ) -> "DeltaPlan":
        """Plan for consecutive pieces `(adapter, number of rows)` of a batch.

        The pieces should be sorted by `slot_order`, so that neighbouring slots
        form one run; any order is served correctly. `merged` is the adapter
        that the weights hold.
        """
        undone: list[Run] = []
        applied: list[Run] = []
        start = 0
        for adapter, num_rows in rows:
            if not num_rows:
                continue
            if merged is not None and adapter is not merged:
                _extend(undone, merged, start, num_rows, Effect.UNDO)
            if adapter is not None:
                effect = Effect.REST if adapter is merged else Effect.APPLY
                _extend(applied, adapter, start, num_rows, effect)
            start += num_rows
        # A term that scales the base output must find it undisturbed.
        return cls((*undone, *applied))


def slot_order(
    adapter: "ResidentAdapter | None", merged: "ResidentAdapter | None" = None
) -> tuple[int, int]:
    """Sort key: the merged adapter's rows, base rows, then neighbouring slots side by side."""
    if adapter is None:
        return (-1, -1)
    return (-2, -1) if adapter is merged else (adapter.slab.number, adapter.slot)


def _extend(
    runs: list[Run], adapter: "ResidentAdapter", start: int, num_rows: int, effect: Effect
) -> None:
    last = runs[-1] if runs else None
    if (
        last is not None
        and last.slab is adapter.slab
        and last.row_start + last.num_rows == start
        and last.effect is effect
    ):
        behind = last.slot_start + last.num_slots
        if adapter.slot in (behind - 1, behind):
            last.extend(num_rows, next_slot=adapter.slot == behind)
            return
    runs.append(Run(adapter.slab, adapter.slot, start, [num_rows], effect=effect))
