"""Linear layers that add the deltas of the current step to the base output."""

from dataclasses import dataclass

import torch
from torch import nn

from dynamic_lora_adapters.groups import ProjectionGroup
from dynamic_lora_adapters.products import BaseProduct
from dynamic_lora_adapters.segments import DeltaPlan


@dataclass(slots=True)
class DeltaSite:
    """What all wrapped layers of a model read: the plan of the running step."""

    plan: DeltaPlan | None = None


class GroupedProjection:
    """The joined projection of a group: one base product, then the deltas in place.

    The first member called with an input computes the output of all members;
    the others take their columns of it. Holds no parameters itself: members'
    weights are views of the joined weight.
    """

    def __init__(
        self,
        group: ProjectionGroup,
        index: int,
        site: DeltaSite,
        base: BaseProduct,
    ) -> None:
        self._group = group
        self._index = index
        self._site = site
        self._base = base
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor | None] = []

    def member(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Output of member `number` for x [..., in], shape [..., width]."""
        if self._input is not x or self._outputs[number] is None:
            self._input = x
            self._outputs = list(self._project(x).split(self._group.widths, dim=-1))
        output = self._outputs[number]
        assert output is not None
        # Each member is asked once per input; forgetting frees the memory and
        # keeps a reused input object from being answered with a stale output.
        self._outputs[number] = None
        if not any(rest is not None for rest in self._outputs):
            self._input = None
        return output

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        out = self._base(x)
        plan = self._site.plan
        if plan is not None and plan.runs:
            self._add_deltas(out.flatten(0, -2), x.flatten(0, -2), plan)
        return out

    def _add_deltas(self, out: torch.Tensor, x: torch.Tensor, plan: DeltaPlan) -> None:
        for run in plan.runs:
            a, b = run.slab.a[self._index], run.slab.b[self._index]
            if a is not None and b is not None:
                assert run.kernel is not None, "a plan must name its kernels"
                rows, slots = run.rows, run.slots
                run.kernel(out[rows], x[rows], a[slots], b[slots], run)


class LoraLinear(nn.Linear):
    """Takes the place of an `nn.Linear`; same weight, bias and attributes."""

    def __init__(self, base: nn.Linear, projection: GroupedProjection, number: int) -> None:
        nn.Module.__init__(self)
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.weight = base.weight
        self.bias = base.bias
        self._projection = projection
        self._number = number

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Base output plus the deltas of the running step, [..., out_features]."""
        return self._projection.member(self._number, input)


class OutputLinear(nn.Linear):
    """Takes the place of the output embedding, to multiply by a packed weight."""

    def __init__(self, base: nn.Linear, product: BaseProduct) -> None:
        nn.Module.__init__(self)
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.weight = base.weight
        self.bias = base.bias
        self._product = product

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [..., out_features]."""
        return self._product(input)
