"""Linear weights as a model keeps them: in one tensor or in several, perhaps in sixteen bits."""

from typing import TypeAlias

import torch

# [out, in], or its rows in several tensors, each [some of out, in]. They may be kept in fewer bits
# than products are computed in, if these have them all.
Weight: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]


def parts_of(weight: Weight) -> tuple[torch.Tensor, ...]:
    """The tensors that have a weight's rows, in their order."""
    return (weight,) if isinstance(weight, torch.Tensor) else weight


def in_one(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] in one tensor of this dtype: where it lies, if it lies so, or a copy."""
    first, *others = [part.to(dtype) for part in parts_of(weight)]
    return torch.cat([first, *others]) if others else first
