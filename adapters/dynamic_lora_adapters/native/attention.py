"""Attention over the KV cache in C++: nothing is gathered, padded or copied."""

import ctypes

import torch

from dynamic_lora_adapters.native.library import allocating, load_library

_POINTER = ctypes.c_void_p
_WriteSizes = ctypes.c_int64 * 5
_AttendSizes = ctypes.c_int64 * 6
# Its widest vector (AVX-512) in floats: the width of a head must be a multiple of it.
_LANES = 16


class NativeAttention:
    """Writes new keys and values, and attends token by token (CPU, float32).

    Tables are float32 too, or bfloat16: values are rounded to it, to the nearest, when written.
    Raises NativeUnavailable where it cannot be compiled.
    """

    def __init__(self) -> None:
        library = load_library("attention")
        self._write = library.dynamic_lora_write
        self._write.argtypes = [*[_POINTER] * 4, ctypes.c_int64]
        self._write.restype = None
        size, number = ctypes.c_int64, ctypes.c_float
        argtypes = [*[_POINTER] * 6, size, _POINTER, number, number, size]
        self._attend = allocating(library, "dynamic_lora_attend", argtypes)

    @staticmethod
    def serves(dtype: torch.dtype, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether queries of `dtype` can be answered from tables [num_cells, kv_heads, dim]."""
        return (
            keys.device.type == "cpu"
            and dtype == torch.float32
            and keys.dtype == values.dtype
            and keys.dtype in (torch.float32, torch.bfloat16)
            and keys.shape[2] % _LANES == 0
            and values.shape[2] % _LANES == 0
        )

    def write(self, table: torch.Tensor, cells: torch.Tensor, x: torch.Tensor) -> None:
        """Store x [kv_heads, num_tokens, dim] at `cells` [num_tokens] of a table."""
        heads, num_tokens, dim = x.shape
        if x.stride(2) != 1:
            x = x.contiguous()
        sizes = _WriteSizes(heads, num_tokens, dim, x.stride(0), x.stride(1))
        self._write(x.data_ptr(), table.data_ptr(), cells.data_ptr(), sizes, _in_bfloat16(table))

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        items: torch.Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Fill the rows of `out` [num_tokens, heads, value_dim] that `items` names.

        `items` [num_items, 3], int64: the row of a token in q [heads,
        num_tokens, dim], the first cell that it sees and how many from there on.
        """
        if q.stride(2) != 1:
            q = q.contiguous()
        if sinks is not None:
            sinks = sinks.float().contiguous()
        sizes = _AttendSizes(
            q.shape[0], keys.shape[1], keys.shape[2], values.shape[2], q.stride(0), q.stride(1)
        )
        self._attend(
            q.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            items.data_ptr(),
            items.shape[0],
            sizes,
            scaling,
            softcap or 0.0,
            _in_bfloat16(keys),
        )


def _in_bfloat16(table: torch.Tensor) -> int:
    """Whether a table is in bfloat16."""
    return int(table.dtype == torch.bfloat16)
