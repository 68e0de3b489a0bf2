"""Tables of low-rank factors with random adapters in them, in any layout."""

import torch

from dynamic_lora_adapters.device.groups import MemberTerms, ProjectionGroup
from dynamic_lora_adapters.device.slab import Slab
from dynamic_lora_adapters.device.slab_layout import SlabLayout
from dynamic_lora_adapters.kernels import SlotFactors
from dynamic_lora_adapters.kernels.factor_layout import FactorLayout
from dynamic_lora_adapters.kernels.native_segments import NativeSegments
from dynamic_lora_adapters.segments import Run
from dynamic_lora_adapters.terms import LinearTerms

Members = list[tuple[int, int]]  # rank and width of each; rank 0: no factors


def group_of(members: Members, in_features: int) -> ProjectionGroup:
    """A group of projections as wide as these members."""
    names = tuple(str(number) for number in range(len(members)))
    return ProjectionGroup(names, in_features, tuple(width for _, width in members))


def random_terms(
    members: Members, group: ProjectionGroup, dtype: torch.dtype = torch.float32
) -> MemberTerms:
    """Factors in float32 that `dtype` holds exactly."""

    def factors(rank: int, width: int) -> LinearTerms:
        a = torch.randn(rank, group.in_features) / group.in_features**0.5
        b = torch.randn(width, rank)
        return LinearTerms(a=a.to(dtype).float(), b=b.to(dtype).float())

    return MemberTerms(group, tuple(factors(r, w) if r else LinearTerms() for r, w in members))


def layout_of(
    group: ProjectionGroup, layout: FactorLayout, factor_dtype: torch.dtype, num_slots: int = 1
) -> SlabLayout:
    """A layout of slabs for one group, beside a model in float32."""
    return SlabLayout(
        [group],
        device=torch.device("cpu"),
        dtype=torch.float32,
        factor_dtype=factor_dtype,
        layout=layout,
        num_slots=num_slots,
    )


def slab_of(adapters: list[MemberTerms], layout: FactorLayout, factor_dtype: torch.dtype) -> Slab:
    """A slab that holds these; whatever is left of what was there before shows."""
    group, shape = adapters[0].group, adapters[0].shape
    made = layout_of(group, layout, factor_dtype, len(adapters))
    slab = made.new_slab(0, (shape,), len(adapters))
    for table in (slab.a[0], slab.b[0]):
        if table is not None:  # a scale of such bytes is no number either
            table.fill_(torch.nan if table.is_floating_point() else 255)
    for slot, terms in enumerate(adapters):
        terms.write(slab.terms(0, slot))
    return slab


def factors_of(slab: Slab, run: Run) -> SlotFactors:
    """The factors of its one group for a run."""
    factors = slab.factors(0, run.slots)
    assert factors is not None
    return factors


def with_and_without_columns(slab: Slab) -> tuple[torch.Tensor, torch.Tensor]:
    """The deltas of 20 rows [48] to outputs [40], with columns that are known and that are not."""
    run = Run(slab, 0, 0, [20])
    factors = factors_of(slab, run)
    x = torch.randn(20, 48)
    known, unknown = torch.zeros(20, 40), torch.zeros(20, 40)
    NativeSegments()(known, x, factors, run)
    NativeSegments()(unknown, x, factors._replace(columns=None), run)
    return known, unknown
