"""One batched product per side over equally long groups of rows."""

import torch

from dynamic_lora_adapters.kernels.base import SlotFactors
from dynamic_lora_adapters.segments import Run


class SortedGroups:
    """Segments as a batch dimension: `baddbmm` over [num_slots, length, .].

    Segments of equal length are a plain view of the packed rows and the delta
    accumulates in place; otherwise rows are gathered into a padded grid and
    the result is added back. Best for many adapters with few rows each.
    The idea of segmented gather products is Punica's (Chen et al. 2023).
    """

    name = "sorted_groups"
    pads = True

    def __call__(self, out: torch.Tensor, x: torch.Tensor, factors: SlotFactors, run: Run) -> None:
        a, b, *_ = factors
        if run.uniform:
            grid = (run.num_slots, run.max_length)
            shrunk = torch.bmm(x.unflatten(0, grid), a.transpose(1, 2))
            out.unflatten(0, grid).baddbmm_(shrunk, b, alpha=run.sign)
            return
        gather, scatter = run.padding(x.device)
        grid = (run.num_slots, run.max_length)
        shrunk = torch.bmm(x.index_select(0, gather).unflatten(0, grid), a.transpose(1, 2))
        expanded = torch.bmm(shrunk, b).flatten(0, 1)
        out.add_(expanded.index_select(0, scatter), alpha=run.sign)
