"""The one meaning that every delta kernel implements."""

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from dynamic_lora_adapters.segments import Run


class SlotFactors(NamedTuple):
    """The factors of one group for the slots of a run.

    Shapes: a [num_slots, rank, in], b [num_slots, rank, out]. `columns`
    [num_slots, rank, 2], int64 on the host, is the first column that is not zero in a row
    of b and the one after the last; None if that is not known. `tiled` factors are as
    FactorLayout.TILES or, with elements of eight bits, BYTES says, and read by `NativeSegments`
    alone.
    """

    a: torch.Tensor
    b: torch.Tensor
    columns: torch.Tensor | None = None
    tiled: bool = False


class DeltaKernel(Protocol):
    """Adds the low-rank deltas of a run of adapters to a layer's output.

    Semantics, for segment i of the run, with `rows_i` its rows:

        out[rows_i] += run.sign * (x[rows_i] @ a[i].T) @ b[i]

    Shapes: x [num_rows, in], out [num_rows, out], a [num_slots, rank, in],
    b [num_slots, rank, out]; scaling is folded into b, ranks shorter than the
    table's are padded with zero rows. `out` is changed in place; nothing else
    is. x, out and the tables share one device, and one dtype, but that
    `NativeSegments` takes tables in bfloat16 too.

    A kernel that `pads` computes as many rows for each segment as the longest has.
    """

    name: str
    pads: bool

    def __call__(
        self, out: torch.Tensor, x: torch.Tensor, factors: SlotFactors, run: "Run"
    ) -> None: ...
