"""The deltas of sorted segments in C++: every table read once, nothing padded or gathered."""

import ctypes
from functools import cache

import torch

from dynamic_lora_adapters.kernels.base import SlotFactors
from dynamic_lora_adapters.native import NativeUnavailable, allocating, load_library
from dynamic_lora_adapters.segments import Run

_POINTER = ctypes.c_void_p
_Sizes = ctypes.c_int64 * 9
_TiledSizes = ctypes.c_int64 * 5
# What `segment_tiles.h` calls FactorFormat.
FACTOR_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}


@cache
def reads_tiles() -> bool:
    """Whether factors in bfloat16 may be laid out in tiles: there is a matrix unit for them."""
    try:
        reads = load_library("segments").dynamic_lora_reads_tiles
    except NativeUnavailable:
        return False
    reads.argtypes = []
    reads.restype = ctypes.c_int64
    return bool(reads())


class NativeSegments:
    """`out += (x @ a.T) @ b` segment by segment, in one parallel region (CPU, float32).

    The factors may be in bfloat16 or float16: they are widened as they are read. Those in tiles
    are multiplied by inputs that are rounded as they are, to bfloat16 (AMX) or eight bits, as is
    what they are shrunk to. Raises NativeUnavailable where it cannot be compiled.
    """

    name = "native_segments"
    pads = False

    def __init__(self) -> None:
        library = load_library("segments")
        argtypes = [*[_POINTER] * 7, ctypes.c_float]
        self._apply = allocating(library, "dynamic_lora_segments", argtypes)
        self._apply_tiled = allocating(library, "dynamic_lora_tiled_segments", argtypes)
        self._apply_bytes = allocating(library, "dynamic_lora_byte_segments", argtypes)

    def __call__(self, out: torch.Tensor, x: torch.Tensor, factors: SlotFactors, run: Run) -> None:
        assert x.dtype == out.dtype == torch.float32 and out.stride(1) == 1
        assert len(x) == len(out) == run.num_rows and len(factors.a) == run.num_slots
        if factors.tiled or x.stride(1) != 1:
            x = x.contiguous()
        apply = self._apply
        if factors.tiled:
            in_bytes = factors.a.dtype is torch.uint8
            apply = self._apply_bytes if in_bytes else self._apply_tiled
        apply(
            x.data_ptr(),
            out.data_ptr(),
            factors.a.data_ptr(),
            factors.b.data_ptr(),
            run.lengths_tensor().data_ptr(),
            None if factors.columns is None else factors.columns.data_ptr(),
            _tiled_sizes(out, x, factors) if factors.tiled else _sizes(out, x, factors),
            run.sign,
        )


def _sizes(
    out: torch.Tensor, x: torch.Tensor, factors: SlotFactors
) -> ctypes.Array[ctypes.c_int64]:
    a, b = factors.a, factors.b
    return _Sizes(
        x.stride(0),
        out.stride(0),
        b.stride(1),
        b.stride(0),
        *a.shape,
        b.shape[2],
        FACTOR_FORMATS[a.dtype],
    )


def _tiled_sizes(
    out: torch.Tensor, x: torch.Tensor, factors: SlotFactors
) -> ctypes.Array[ctypes.c_int64]:
    num_slots, rank, _ = factors.a.shape
    return _TiledSizes(num_slots, rank, x.shape[1], out.shape[1], out.stride(0))
