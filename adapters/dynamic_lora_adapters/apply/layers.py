"""Linear layers that add the deltas of the current step to the base output."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dynamic_lora_adapters.apply.products import BaseProduct
from dynamic_lora_adapters.apply.uncompiled import uncompiled
from dynamic_lora_adapters.device.groups import ProjectionGroup
from dynamic_lora_adapters.rows import RowSegment
from dynamic_lora_adapters.segments import DeltaPlan, Effect, Run
from dynamic_lora_adapters.weight import Weight, in_one


class StaticDeltas(Protocol):
    """Deltas of a step whose shape is fixed: which rows and adapters, tensors say."""

    def add(self, index: int, out: torch.Tensor, x: torch.Tensor) -> None:
        """Add what group `index` gets for x [num_rows, in] to out [num_rows, out], in place."""


@dataclass(slots=True)
class DeltaSite:
    """What all wrapped layers of a model read: the plans of the running step.

    `plan` is for every row of the batch, `head_plan` for the rows whose logits
    are wanted, `segments` are the rows with terms on other modules. `static`
    takes the place of both plans.
    """

    plan: DeltaPlan | None = None
    head_plan: DeltaPlan | None = None
    segments: tuple[RowSegment, ...] = ()
    static: StaticDeltas | None = None


class GroupedProjection:
    """The joined projection of a group: one base product, then the deltas in place.

    The first member called with an input computes the output of all members;
    the others take their columns of it. Holds no parameters itself: `kept` are
    the members' weights, one each or joined, and `dtype` is what it computes in.
    """

    def __init__(
        self,
        group: ProjectionGroup,
        index: int,
        site: DeltaSite,
        base: BaseProduct,
        kept: Weight,
        bias: torch.Tensor | None,
        *,
        dtype: torch.dtype,
        transposed: bool = False,
    ) -> None:
        self.group = group
        self.base = base
        self.kept = kept
        self.dtype = dtype
        self.transposed = transposed
        self.index = index
        self._site = site
        self._bias = bias
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor | None] = []

    @property
    def weight(self) -> torch.Tensor:
        """The joined weight [out, in]: a copy, unless it is kept so."""
        return in_one(self.kept, self.dtype)

    def of_members(self, weight: Weight) -> tuple[torch.Tensor, ...]:
        """A weight as `kept` is, by members [width, in]."""
        if isinstance(weight, tuple):
            return weight
        return tuple(weight.split(list(self.group.widths)))

    def member(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Output of member `number` for x [..., in], shape [..., width]."""
        if len(self.group.paths) == 1:
            return self._project(x)
        if self._input is not x or self._outputs[number] is None:
            self._input = x
            self._outputs = list(self._project(x).split_with_sizes(self.group.widths, dim=-1))
        output = self._outputs[number]
        assert output is not None
        # Each member is asked once per input; forgetting frees the memory and
        # keeps a reused input object from being answered with a stale output.
        self._outputs[number] = None
        if not any(rest is not None for rest in self._outputs):
            self._input = None
        return output

    @property
    def is_plain(self) -> bool:
        """Whether the running step adds nothing to the base product."""
        plan = self._site.head_plan if self.group.is_head else self._site.plan
        slabs = () if plan is None else [run.slab for run in plan.runs]
        return self._site.static is None and not any(slab.acts_on(self.index) for slab in slabs)

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        plan = self._site.head_plan if self.group.is_head else self._site.plan
        if plan is not None and plan.runs:
            self._add_terms(_as_rows(out), _as_rows(x), plan)
        if self._site.static is not None:
            self._site.static.add(self.index, out.flatten(0, -2), x.flatten(0, -2))
        return out

    def _add_terms(self, out: torch.Tensor, x: torch.Tensor, plan: DeltaPlan) -> None:
        index = self.index
        for run in plan.runs:
            slab, rows = run.slab, run.rows
            whole = run.num_rows == out.shape[0]
            part, given = (out, x) if whole else (out[rows], x[rows])
            if run.effect is Effect.APPLY and index in slab.scale:
                self._scale(part, slab.scale[index], run)
            if run.effect is not Effect.REST:
                factors = slab.factors(index, run.slots)
                if factors is not None:
                    assert run.kernel is not None, "a plan must name its kernels"
                    run.kernel(part, given, factors, run)
                if index in slab.dense:
                    _add_dense(part, given, slab.dense[index][run.slots], run)
            if run.effect is Effect.UNDO and index in slab.scale:
                self._unscale(part, slab.scale[index][run.slot_start])
            if run.effect is not Effect.UNDO and index in slab.bias:
                part += _by_row(slab.bias[index], run)

    def _scale(self, out: torch.Tensor, scale: torch.Tensor, run: Run) -> None:
        plain = out if self._bias is None else out - self._bias
        out.addcmul_(plain, _by_row(scale, run))

    def _unscale(self, out: torch.Tensor, scale: torch.Tensor) -> None:
        if self._bias is None:
            out.div_(1 + scale)
        else:
            out.sub_(self._bias).div_(1 + scale).add_(self._bias)


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., width] as [rows, width], for the packed row [1, rows, width] by a cheap view."""
    return x[0] if x.dim() == 3 and x.shape[0] == 1 else x.flatten(0, -2)


def _by_row(table: torch.Tensor, run: Run) -> torch.Tensor:
    """The slots' vectors of a table [num_slots, out], one for each row of the run."""
    return table[run.slots].index_select(0, run.owner(table.device))


def _add_dense(out: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, run: Run) -> None:
    pieces = zip(out.split(run.lengths), x.split(run.lengths), dense, strict=True)
    for out_i, x_i, dense_i in pieces:
        out_i.addmm_(x_i, dense_i.T, alpha=run.sign)


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

    @uncompiled
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Base output plus the terms of the running step, [..., out_features]."""
        return self._projection.member(self._number, input)


class LoraConv1D(Conv1D):
    """Takes the place of transformers' `Conv1D` (GPT-2), whose weight is [in, out]."""

    def __init__(self, base: Conv1D, projection: GroupedProjection) -> None:
        nn.Module.__init__(self)
        self.nf = base.nf
        self.nx = base.nx
        self.weight = base.weight
        self.bias = base.bias
        self._projection = projection

    @uncompiled
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Base output plus the terms of the running step, [..., nf]."""
        return self._projection.member(0, x)
