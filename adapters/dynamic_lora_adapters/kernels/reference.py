"""The slow loop that the other kernels are tested against."""

import torch

from dynamic_lora_adapters.kernels.base import SlotFactors
from dynamic_lora_adapters.segments import Run


class Reference:
    """One row at a time, accumulated in float32."""

    name = "reference"
    pads = False

    def __call__(self, out: torch.Tensor, x: torch.Tensor, factors: SlotFactors, run: Run) -> None:
        a, b, *_ = factors
        row = 0
        for slot, length in enumerate(run.lengths):
            shrink, expand = a[slot].float(), b[slot].float()
            for _ in range(length):
                delta = run.sign * ((x[row].float() @ shrink.T) @ expand)
                out[row] = (out[row].float() + delta).to(out.dtype)
                row += 1
