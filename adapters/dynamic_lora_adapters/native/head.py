"""The last norm and the output head in C++, where only the highest logit of each row is wanted."""

import ctypes
from dataclasses import dataclass

import torch

from dynamic_lora_adapters.native.library import allocating, load_library
from dynamic_lora_adapters.native.norm import NativeRmsNorm, NormParts
from dynamic_lora_adapters.native.product import NativeProduct, Projection

_POINTER = ctypes.c_void_p


class _Head(ctypes.Structure):
    _fields_ = [("norm", NormParts), ("base", Projection)]


@dataclass(frozen=True, slots=True)
class Highest:
    """Where each row of logits is highest, and whether it is sound: `verdicts` [2, rows], int64.

    Of equal ones it is the first. A row is sound if it holds no NaN and its highest is finite.
    `log_masses` [rows], float32, are minus the log-probabilities of the tokens, if asked for.
    """

    verdicts: torch.Tensor
    log_masses: torch.Tensor | None = None

    @property
    def positions(self) -> torch.Tensor:
        """Where each row is highest, [rows]."""
        return self.verdicts[0]


class NativeHead:
    """Finds the `Highest` of what a norm and a linear layer give for hidden states (CPU, float32).

    Logits are neither written nor read: for 32 rows of a vocabulary of 49k they are 6 MB.
    Raises NativeUnavailable where it cannot be compiled.
    """

    def __init__(self, norm: NativeRmsNorm, base: NativeProduct) -> None:
        argtypes = [_POINTER, _POINTER, _POINTER, ctypes.c_int64, *[_POINTER] * 3]
        self._highest = allocating(load_library("head"), "dynamic_lora_highest", argtypes)
        self._kept = norm.weight, base
        self._width = len(norm.weight)
        assert base.projection.k == self._width
        self._c = _Head(norm=NormParts.of(norm), base=base.projection)
        self._address = ctypes.addressof(self._c)

    def __call__(
        self, hidden: torch.Tensor, rows: torch.Tensor, *, with_logprobs: bool = False
    ) -> Highest:
        """Of rows [num_rows], int64, of hidden states [..., all rows, width].

        `with_logprobs` asks for the `log_masses`.
        """
        hidden, rows = hidden.contiguous(), rows.contiguous()
        assert hidden.dtype == torch.float32 and hidden.shape[-1] == self._width
        assert rows.dtype == torch.int64
        found = torch.empty(2, len(rows), dtype=torch.long)
        log_masses = torch.empty(len(rows)) if with_logprobs else None
        first = found.data_ptr()
        self._highest(
            self._address,
            hidden.data_ptr(),
            rows.data_ptr(),
            len(rows),
            first,
            first + found.stride(0) * found.itemsize,
            None if log_masses is None else log_masses.data_ptr(),
        )
        return Highest(found, log_masses)
