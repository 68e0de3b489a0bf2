"""Random draws from rows of logits, in C++: no sort, and few logarithms."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dynamic_lora_adapters.native.library import allocating, load_library

_POINTER = ctypes.c_void_p
_SIZE = ctypes.c_int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One draw from a row of logits, with the noise of a key of 64 bits.

    Logits are divided by `temperature`; of the tokens then stay the `top_k` likeliest
    (0: all), of these the likeliest that together reach the probability `top_p` (1: all;
    Holtzman et al. 2019), and of them those of at least `min_p` times the highest
    probability (Nguyen et al. 2024).
    """

    row: int
    key: int
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class _Draw(ctypes.Structure):
    _fields_ = [
        ("row", _SIZE),
        ("key", ctypes.c_uint64),
        ("top_k", _SIZE),
        *[(name, ctypes.c_float) for name in ("temperature", "top_p", "min_p")],
    ]


class NativeDraws:
    """Draws tokens (CPU, float32). Raises NativeUnavailable where it cannot be compiled."""

    def __init__(self) -> None:
        argtypes = [_POINTER, _SIZE, _POINTER, _SIZE, _POINTER]
        self._draw = allocating(load_library("draws"), "dynamic_lora_draws", argtypes)

    def __call__(self, logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
        """A token for each draw from rows of logits [rows, vocab], [num_draws] int64.

        By the Gumbel-max trick: the token with the largest sum of scaled logit and noise.
        A row that holds NaN or +inf, or nothing but -inf, gives any token.
        """
        assert logits.dtype == torch.float32 and logits.dim() == 2
        assert all(0 <= draw.row < len(logits) for draw in draws)
        logits = logits.contiguous()
        tokens = torch.empty(len(draws), dtype=torch.long)
        array = (_Draw * len(draws))(*map(_laid_out, draws))
        self._draw(logits.data_ptr(), logits.shape[1], array, len(draws), tokens.data_ptr())
        return tokens


def _laid_out(draw: Draw) -> _Draw:
    return _Draw(
        row=draw.row,
        key=draw.key,
        top_k=draw.top_k,
        temperature=draw.temperature,
        top_p=draw.top_p,
        min_p=draw.min_p,
    )
