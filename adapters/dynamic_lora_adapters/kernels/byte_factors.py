"""Low-rank factors in eight bits, as products in integers read them (`native/byte_factors.h`).

    a [rank / 16]: 16 scales in float32, and [in / 4, 16, 4]
    b [rank / 16, out / 16, 4, 16, 4]

Fours of inputs lie side by side for sixteen ranks, fours of ranks for sixteen outputs; 128 is added
to each. A rank's scale is that of its row of a times that of its row of b. Ranks and outputs go on
with zeros to a multiple of 16, inputs to one of 4.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch

from dynamic_lora_adapters.native import allocating, load_library

RANKS = 16
INPUTS = 4
OUTPUTS = 16
SCALE_BYTES = torch.float32.itemsize
_FOUR = 4  # that one instruction multiplies and adds up, for each sum
_LARGEST = 127
_ADDED = 128
_POINTER = ctypes.c_void_p
_Sizes = ctypes.c_int64 * 6


def rounded_to_bytes(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a [rank, in] and b [out, rank], float32, are once bytes hold them."""
    return _rounded(a, 1), _rounded(b, 0)


def compile_ahead() -> None:
    """Have ready what writes factors. Raises NativeUnavailable where it cannot be compiled."""
    _writer()


def clear_bytes(place_a: torch.Tensor, place_b: torch.Tensor) -> None:
    """Make all factors of a slot zero."""
    place_a.fill_(_ADDED)
    place_b.fill_(_ADDED)
    scales, _ = _tiles_of_a(place_a)
    scales.zero_()


def write_bytes(
    a: torch.Tensor,
    b: torch.Tensor,
    place_a: torch.Tensor,
    place_b: torch.Tensor,
    *,
    rank: int,
    column: int,
) -> None:
    """Round a [ranks, in] and b [width, ranks] to a slot that holds zeros there.

    `rank` is the first of the slot's that they are, `column` the first output.
    """
    a, b = (factors.float().contiguous() for factors in (a, b))
    sizes = _Sizes(*a.shape, len(b), rank, column, place_b.shape[1])
    _writer()(a.data_ptr(), b.data_ptr(), place_a.data_ptr(), place_b.data_ptr(), sizes)


def read_bytes(place_a: torch.Tensor, place_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a [rank, inputs], with both scales of each rank in it, and b [rank, outputs], float32."""
    rank = len(place_a)
    scales, fours_a = _tiles_of_a(place_a)
    a = (fours_a.float() - _ADDED).reshape(rank, -1) * scales.reshape(rank, 1)
    b = (_tiles_of_b(place_b).float() - _ADDED).reshape(-1, rank)
    return a, b.T.contiguous()


@cache
def _writer() -> Callable[..., None]:
    arguments = [*[_POINTER] * 4, _Sizes]
    return allocating(load_library("byte_factors"), "dynamic_lora_write_bytes", arguments)


def _rounded(factors: torch.Tensor, dim: int) -> torch.Tensor:
    """Multiples of a rank's scale, which lies along `dim`; a rank of zeros keeps them."""
    scales = factors.abs().amax(dim, keepdim=True) / _LARGEST
    return (factors / scales.masked_fill(scales == 0, 1)).round() * scales


def _tiles_of_a(place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a slot's a [rank, width], the scales [rank / 16, 16] in float32, and the factors
    [rank / 16, 16, in / 4, 4] of the plain one."""
    rank, width = place.shape
    tiles = place.view(rank // RANKS, RANKS * width)
    scales, factors = tiles.split([RANKS * SCALE_BYTES, RANKS * (width - SCALE_BYTES)], 1)
    fours = factors.unflatten(1, (-1, RANKS, _FOUR)).transpose(1, 2)
    return scales.view(torch.float32), fours


def _tiles_of_b(place: torch.Tensor) -> torch.Tensor:
    """Of a slot's b [rank, width], the factors [width / 16, 16, rank / 16, 4, 4]."""
    rank, width = place.shape
    tiles = rank // RANKS, width // OUTPUTS, RANKS // _FOUR, OUTPUTS, _FOUR
    return place.view(tiles).permute(1, 3, 0, 2, 4)
