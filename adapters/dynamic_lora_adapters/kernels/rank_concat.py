"""All ranks of all adapters side by side: two dense products and a mask."""

import torch

from dynamic_lora_adapters.kernels.base import SlotFactors
from dynamic_lora_adapters.segments import Run


class RankConcat:
    """`out += (x @ A_cat.T * mask) @ B_cat` with A_cat [num_slots * rank, in].

    Every row is multiplied by every adapter and the mask [num_rows, num_slots]
    keeps its own, so arithmetic grows with the number of adapters, but there
    is no sort and no padding. Best for a handful of adapters on few rows.
    """

    name = "rank_concat"
    pads = False

    def __call__(self, out: torch.Tensor, x: torch.Tensor, factors: SlotFactors, run: Run) -> None:
        a, b, *_ = factors
        num_slots, rank, _ = a.shape
        shrunk = (x @ a.flatten(0, 1).T).view(-1, num_slots, rank)
        slots = torch.arange(num_slots, device=x.device)
        foreign = run.owner(x.device)[:, None] != slots
        shrunk.masked_fill_(foreign[:, :, None], 0)
        out.addmm_(shrunk.flatten(1), b.flatten(0, 1), alpha=run.sign)
