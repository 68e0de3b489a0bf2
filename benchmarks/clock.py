"""How fast the machine is at the moment: a fixed set of matrix products, timed.

The clock of a shared or a virtual machine changes while a comparison runs. The same products,
timed before and after each cell, say by how much.
"""

import time

import torch

_NUM_WEIGHTS = 32
_WIDTH = 1024
_ROWS = 32


class Clock:
    """Products of 32 rows with 128 MiB of weights, which no processor cache of today holds."""

    def __init__(self, seconds: float = 0.25) -> None:
        self._seconds = seconds
        self._weights = torch.randn(_NUM_WEIGHTS, _WIDTH, _WIDTH)
        self._rows = torch.randn(_ROWS, _WIDTH)

    @torch.inference_mode()
    def read(self) -> float:
        """GFLOP/s over about a quarter of a second, on all of torch's threads."""
        self._pass()
        num_passes = 0
        start = time.perf_counter()
        while (spent := time.perf_counter() - start) < self._seconds or not num_passes:
            self._pass()
            num_passes += 1
        operations = 2 * _ROWS * self._weights.numel()
        return num_passes * operations / spent / 1e9

    def _pass(self) -> None:
        for weight in self._weights:
            torch.mm(self._rows, weight)
