"""Delta kernels: several ways to compute one meaning, see `base`."""

import logging
import os
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec

import torch

from dynamic_lora_adapters.kernels import byte_factors
from dynamic_lora_adapters.kernels.base import DeltaKernel, SlotFactors
from dynamic_lora_adapters.kernels.grouped_gemm import GroupedGemm
from dynamic_lora_adapters.kernels.native_segments import NativeSegments
from dynamic_lora_adapters.kernels.rank_concat import RankConcat
from dynamic_lora_adapters.kernels.reference import Reference
from dynamic_lora_adapters.kernels.segment_loop import SegmentLoop
from dynamic_lora_adapters.kernels.sorted_groups import SortedGroups
from dynamic_lora_adapters.native import NativeUnavailable
from dynamic_lora_adapters.transfer import check_alive

logger = logging.getLogger(__name__)

REFERENCE: DeltaKernel = Reference()
KERNELS: dict[str, DeltaKernel] = {
    kernel.name: kernel for kernel in (SegmentLoop(), RankConcat(), SortedGroups())
}
"""Those that run on every device, in every dtype."""

_TRITON = "triton_segments"


def kernels_for(
    device: torch.device,
    dtype: torch.dtype,
    widths: Iterable[int] = (),
    *,
    native: bool = True,
    factor_dtype: torch.dtype | None = None,
) -> dict[str, DeltaKernel]:
    """The kernels that run on a device in a dtype, by name.

    Factors of a `factor_dtype` of their own are read by the project's C++ alone:
    raises NativeUnavailable where that cannot be compiled.

    `widths` are the input and output widths of the layers: torch's grouped
    GEMM takes rows of a multiple of 16 bytes only. `native` includes the
    project's C++, where it can be compiled.
    """
    if factor_dtype not in (None, dtype):
        if factor_dtype is torch.uint8:
            byte_factors.compile_ahead()
        return {NativeSegments.name: NativeSegments()}
    found = dict(KERNELS)
    if native and device.type == "cpu" and dtype == torch.float32:
        try:
            found[NativeSegments.name] = NativeSegments()
        except NativeUnavailable as reason:
            logger.info("No native delta kernel: %s", reason)
    if device.type != "cuda":
        return found
    if has_triton(device):
        from dynamic_lora_adapters.kernels.triton_segments import TritonSegments

        found[TritonSegments.name] = TritonSegments()
    if _has_grouped_gemm(device) and dtype == torch.bfloat16 and not any(n % 8 for n in widths):
        found[GroupedGemm.name] = GroupedGemm()
    return found


def compiled_ahead(
    kernels: Mapping[str, DeltaKernel],
    shapes: Iterable[tuple[int, int]],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, DeltaKernel]:
    """Those of `kernels` that run, all they need being compiled for layers of (in, out) widths.

    A step that came to need another variant would hold everybody up. Raises
    torch.AcceleratorError where nothing runs on the device any more.
    """
    found = dict(kernels)
    if _TRITON in found:
        from dynamic_lora_adapters.kernels import triton_segments

        try:
            triton_segments.compile_ahead(shapes, device, dtype)
        except Exception as error:  # whatever it is, the other kernels do
            check_alive(device)
            kind = type(error).__name__
            logger.warning("Triton's delta kernels do not compile here: %s: %s", kind, error)
            del found[_TRITON]
    return found


def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device: on CUDA, and elsewhere in its interpreter.

    They are tried once: Triton compiles at run time, and needs a C compiler for it.
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    if find_spec("triton") is None:
        logger.warning("Triton is not installed; its kernels are left out")
        return False
    return _triton_runs(device)


@cache
def _triton_runs(device: torch.device) -> bool:
    try:
        from dynamic_lora_adapters.kernels.triton_segments import try_out

        try_out(device)
    except Exception as error:  # whatever it is, the other kernels do
        check_alive(device)
        logger.warning("Triton's kernels do not run here: %s: %s", type(error).__name__, error)
        return False
    return True


def _has_grouped_gemm(device: torch.device) -> bool:
    # On older processors than Hopper it asks the device for the lengths, and waits for them.
    documented = hasattr(torch.nn.functional, "grouped_mm")
    return documented and torch.cuda.get_device_capability(device) >= (9, 0)


__all__ = [
    "KERNELS",
    "REFERENCE",
    "DeltaKernel",
    "SlotFactors",
    "compiled_ahead",
    "has_triton",
    "kernels_for",
]
