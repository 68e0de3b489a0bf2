"""Two matrix products per adapter, accumulated in place."""

import torch

from dynamic_lora_adapters.kernels.base import SlotFactors
from dynamic_lora_adapters.segments import Run


class SegmentLoop:
    """`out[rows_i].addmm_(x[rows_i] @ a_i.T, b_i)` for each segment.

    No wasted arithmetic and no copies; the cost per call grows with the number
    of adapters. Best for one adapter and for long prefills.
    """

    name = "segment_loop"
    pads = False

    def __call__(self, out: torch.Tensor, x: torch.Tensor, factors: SlotFactors, run: Run) -> None:
        a, b, *_ = factors
        pieces = zip(out.split(run.lengths), x.split(run.lengths), a, b, strict=True)
        for out_i, x_i, a_i, b_i in pieces:
            out_i.addmm_(x_i @ a_i.T, b_i, alpha=run.sign)
