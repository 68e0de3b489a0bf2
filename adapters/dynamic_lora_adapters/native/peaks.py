"""The highest logit of each row, and what its probability is divided by, in C++."""

import ctypes
from typing import NamedTuple

import torch

from dynamic_lora_adapters.native.library import load_library


class Peaks(NamedTuple):
    """Where each row is highest, [rows] int64, how high, [rows], and its log mass, [rows].

    The log mass is the logarithm of the sum of e^(logit - height) over the whole row;
    NaN if that holds a NaN or +inf, or nothing but -inf. A token's log-probability is
    its logit less the height less the log mass.
    """

    positions: torch.Tensor
    heights: torch.Tensor
    log_masses: torch.Tensor


class NativePeaks:
    """Finds `Peaks` (CPU, float32). Raises NativeUnavailable where it cannot be compiled."""

    def __init__(self) -> None:
        self._peaks = load_library("peaks").dynamic_lora_peaks
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._peaks.argtypes = [pointer, size, size, pointer, pointer, pointer]
        self._peaks.restype = None

    def __call__(self, logits: torch.Tensor) -> Peaks:
        """The peaks of logits [rows, vocab]; the first of equal ones is the highest."""
        logits = logits.contiguous()
        rows, width = logits.shape
        peaks = Peaks(torch.empty(rows, dtype=torch.long), torch.empty(rows), torch.empty(rows))
        self._peaks(logits.data_ptr(), rows, width, *(found.data_ptr() for found in peaks))
        return peaks
