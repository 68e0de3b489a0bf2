"""One grouped product per side, with torch's own grouped GEMM."""

import torch
import torch.nn.functional as F

from dynamic_lora_adapters.kernels.base import SlotFactors
from dynamic_lora_adapters.segments import Run


class GroupedGemm:
    """`torch.nn.functional.grouped_mm` over segments of any length.

    No padding and no copies of rows; the delta is a tensor of its own that is
    added at the end. On CUDA it takes bfloat16 and rows of 16 bytes' multiple.
    """

    name = "grouped_gemm"
    pads = False

    def __call__(self, out: torch.Tensor, x: torch.Tensor, factors: SlotFactors, run: Run) -> None:
        a, b, *_ = factors
        ends = run.ends(x.device)
        shrunk = F.grouped_mm(x, a.transpose(1, 2), offs=ends)
        out.add_(F.grouped_mm(shrunk, b, offs=ends), alpha=run.sign)
