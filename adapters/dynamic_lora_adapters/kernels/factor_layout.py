"""How low-rank factors lie in memory, for the kernels that read them."""

from enum import Enum, auto

import torch

from dynamic_lora_adapters.kernels import byte_factors
from dynamic_lora_adapters.kernels.native_segments import reads_tiles

TILE_RANKS = 8
_TILE_INPUTS = 32
_TILE_OUTPUTS = 16
_LINE_BYTES = 64


class FactorLayout(Enum):
    """ROWS: plain tables. SPREAD: the rows of b an odd number of cache lines apart.

    TILES: bfloat16 as a processor's matrix unit reads it (`native/factor_tiles.h`):

        a [rank / 8, in / 2, 8, 2]      b [rank / 8, out / 16, 4, 16, 2]

    pairs of inputs for eight ranks, pairs of ranks for sixteen outputs. Inputs go on with
    zeros to a multiple of 32, outputs to one of 16.

    BYTES: eight bits, in tiles too, as `byte_factors` says.
    """

    ROWS = auto()
    SPREAD = auto()
    TILES = auto()
    BYTES = auto()

    @property
    def tiled(self) -> bool:
        """Whether factors lie in tiles."""
        return self in (FactorLayout.TILES, FactorLayout.BYTES)

    def ranks(self, rank: int) -> int:
        """Ranks of a table for adapters of a rank."""
        return _multiple(rank, byte_factors.RANKS) if self is FactorLayout.BYTES else rank

    def a_width(self, in_features: int) -> int:
        """Elements of a rank of a."""
        if self is FactorLayout.BYTES:
            return _multiple(in_features, byte_factors.INPUTS) + byte_factors.SCALE_BYTES
        return _multiple(in_features, _TILE_INPUTS) if self is FactorLayout.TILES else in_features

    def b_width(self, out_features: int, itemsize: int) -> int:
        """Elements of a rank of b, what lies between two ranks included."""
        if self.tiled:
            return _multiple(out_features, _TILE_OUTPUTS)
        return spread_width(out_features, itemsize) if self is FactorLayout.SPREAD else out_features


def layout_for(device: torch.device, factor_dtype: torch.dtype | None) -> FactorLayout:
    """What the project's C++ reads fastest where it runs; plain tables elsewhere.

    `factor_dtype` is what factors are kept in if that is not what the model computes in.
    """
    if factor_dtype is torch.uint8:
        return FactorLayout.BYTES
    if device.type != "cpu":
        return FactorLayout.ROWS
    if factor_dtype is torch.bfloat16 and reads_tiles():
        return FactorLayout.TILES
    return FactorLayout.SPREAD


def spread_width(width: int, itemsize: int) -> int:
    """How far apart rows of `width` elements should lie: an odd number of cache lines.

    A column of a table whose rows are a multiple of 4 KiB apart falls into one
    set of the first-level cache, where eight rows of it have room.
    """
    line = _LINE_BYTES // itemsize
    return (-(-width // line) | 1) * line


def _pairs_of_a(place: torch.Tensor) -> torch.Tensor:
    """The tiles of a slot's a [rank, width], as pairs [rank / 8, 8, width / 2] of the plain one."""
    rank, width = place.shape
    pairs = place.view(torch.int32).view(rank // TILE_RANKS, width // 2, TILE_RANKS)
    return pairs.transpose(1, 2)


def _pairs_of_b(place: torch.Tensor) -> torch.Tensor:
    """The tiles of a slot's b [rank, width], as pairs of ranks [width / 16, 16, rank / 8, 4]."""
    rank, width = place.shape
    tiles = rank // TILE_RANKS, width // _TILE_OUTPUTS, TILE_RANKS // 2, _TILE_OUTPUTS
    return place.view(torch.int32).view(tiles).permute(1, 3, 0, 2)


def write_tiles(
    a: torch.Tensor, b: torch.Tensor, place_a: torch.Tensor, place_b: torch.Tensor
) -> None:
    """Lay out a [rank, in] and b [out, rank], bfloat16 and filled up to whole tiles."""
    pairs_a, pairs_b = _pairs_of_a(place_a), _pairs_of_b(place_b)
    pairs_a.copy_(a.view(torch.int32).view(pairs_a.shape))
    pairs_b.copy_(b.view(torch.int32).view(pairs_b.shape))


def read_tiles(place_a: torch.Tensor, place_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies a [rank, width] and b [rank, width] of what lies in tiles.

    Those of bytes are in float32, with both scales of a rank in a.
    """
    if place_a.dtype is torch.uint8:
        return byte_factors.read_bytes(place_a, place_b)
    rank = len(place_a)
    a = _pairs_of_a(place_a).reshape(rank, -1).contiguous().view(place_a.dtype)
    b = _pairs_of_b(place_b).reshape(-1, rank // 2).contiguous().view(place_b.dtype)
    return a, b.T.contiguous()


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of
