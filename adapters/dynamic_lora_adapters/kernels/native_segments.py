"""The deltas of sorted segments in C++: every table read once, nothing padded or gathered."""

import ctypes

import torch

from dynamic_lora_adapters.kernels.base import SlotFactors
from dynamic_lora_adapters.native import load_library
from dynamic_lora_adapters.segments import Run

_POINTER = ctypes.c_void_p
_Sizes = ctypes.c_int64 * 9


class NativeSegments:
    """`out += (x @ a.T) @ b` segment by segment, in one parallel region (CPU, float32).

    The factors may be bfloat16: they are widened as they are read. Raises NativeUnavailable
    where it cannot be compiled.
    """

    name = "native_segments"

    def __init__(self) -> None:
        self._apply = load_library("segments").dynamic_lora_segments
        self._apply.argtypes = [*[_POINTER] * 7, ctypes.c_float]
        self._apply.restype = None

    def __call__(self, out: torch.Tensor, x: torch.Tensor, factors: SlotFactors, run: Run) -> None:
        a, b, columns = factors
        if x.stride(1) != 1:
            x = x.contiguous()
        num_slots, rank, in_features = a.shape
        sizes = _Sizes(
            *(x.stride(0), out.stride(0), b.stride(1), b.stride(0)),
            *(num_slots, rank, in_features, b.shape[2], a.itemsize),
        )
        self._apply(
            x.data_ptr(),
            out.data_ptr(),
            a.data_ptr(),
            b.data_ptr(),
            run.lengths_tensor().data_ptr(),
            None if columns is None else columns.data_ptr(),
            sizes,
            run.sign,
        )
