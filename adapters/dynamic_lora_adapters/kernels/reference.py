"""The slow loop that the other kernels are tested against."""

import torch

from dynamic_lora_adapters.segments import Run


class Reference:
    """One row at a time, accumulated in float32."""

    name = "reference"

    def __call__(
        self, out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, run: Run
    ) -> None:
        row = 0
        for slot, length in enumerate(run.lengths):
            shrink, expand = a[slot].float(), b[slot].float()
            for _ in range(length):
                delta = run.sign * ((x[row].float() @ shrink.T) @ expand)
                out[row] = (out[row].float() + delta).to(out.dtype)
                row += 1
