"""Delta kernels: several ways to compute one meaning, see `base`."""

from dynamic_lora_adapters.kernels.base import DeltaKernel
from dynamic_lora_adapters.kernels.rank_concat import RankConcat
from dynamic_lora_adapters.kernels.reference import Reference
from dynamic_lora_adapters.kernels.segment_loop import SegmentLoop
from dynamic_lora_adapters.kernels.sorted_groups import SortedGroups

REFERENCE: DeltaKernel = Reference()
KERNELS: dict[str, DeltaKernel] = {
    kernel.name: kernel for kernel in (SegmentLoop(), RankConcat(), SortedGroups())
}

__all__ = ["KERNELS", "REFERENCE", "DeltaKernel"]
