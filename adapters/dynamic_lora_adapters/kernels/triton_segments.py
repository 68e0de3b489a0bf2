"""Triton kernels over tiles of sorted rows: one launch per side for any mix of adapters.

The first kernel shrinks, `x·A`, with the input's columns split over programs;
the parts stay apart, in float32. The second adds them up, expands by `·B` and
accumulates in place. Each element of the output belongs to one program, so
nothing is atomic and equal inputs give equal outputs. The way of walking over
segments is Punica's (Chen et al. 2023), splitting the columns S-LoRA's (Sheng
et al. 2023).

Everything that changes from step to step is read from tensors: which rows,
which adapter, how many tiles. A captured launch therefore serves any batch of
its size. Imports triton, so it is imported only where there is one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl

from dynamic_lora_adapters.kernels.base import SlotFactors
from dynamic_lora_adapters.segments import Run
from dynamic_lora_adapters.tiles import LONG, SHORT, tile_rows

# Programs that share one row's columns, and the columns each takes at a time.
_MAX_SPLITS = 8
_STEP = 128
_STEP_FLOAT32 = 32  # its products are unrolled: longer steps take a minute to compile
_COLUMNS = 128
_RANKS = (16, 32, 64)  # at a time: of small adapters no more than they have


def shrink_kernel(
    x: "Any",  # [num_rows, in_features], rows `x_stride` apart
    a: "Any",  # tables [slots, max_rank, in_features], or addresses [slots]
    ranks: "Any",  # [slots], read with addresses only
    tiles: "Any",  # as `tiles_of` lays them out
    shrunk: "Any",  # [splits, num_rows, max_rank], float32
    x_stride: "Any",
    num_rows: "Any",
    in_features: "Any",
    max_rank: "Any",
    split_size: "Any",  # columns of a split, a multiple of STEP
    ADDRESSES: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    STEP: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Program (p, r, s): tiles p, p + P, ..., block r of ranks, split s of columns."""
    rank_at = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    begin = tl.program_id(2) * split_size
    stop = tl.minimum(begin + split_size, in_features)
    row = tl.arange(0, ROWS)
    for tile in range(tl.program_id(0), tl.load(tiles), tl.num_programs(0)):
        first = tl.load(tiles + 3 * tile + 1).to(tl.int64)
        count = tl.load(tiles + 3 * tile + 2)
        slot = tl.load(tiles + 3 * tile + 3).to(tl.int64)
        if ADDRESSES:
            factors = tl.load(a + slot).to(tl.pointer_type(x.dtype.element_ty))
            factors = tl.multiple_of(factors, 16)
            rank = tl.load(ranks + slot)
        else:
            factors = a + slot * max_rank * in_features
            rank = max_rank
        rows_in = (row < count)[:, None]
        ranks_in = (rank_at < rank)[None, :]
        # A captured step makes room for ranks that few adapters have.
        if tl.program_id(1) * RANKS < rank:
            part = tl.full((ROWS, RANKS), 0.0, tl.float32)
            for start in range(begin, stop, STEP):
                column = start + tl.arange(0, STEP)
                inside = column < stop
                x_at = x + (first + row)[:, None] * x_stride + column[None, :]
                a_at = factors + rank_at[None, :] * in_features + column[:, None]
                inputs = tl.load(x_at, mask=rows_in & inside[None, :], other=0.0)
                weights = tl.load(a_at, mask=ranks_in & inside[:, None], other=0.0)
                if UPCAST:
                    inputs, weights = inputs.to(tl.float32), weights.to(tl.float32)
                part = tl.dot(inputs, weights, part, input_precision="ieee")
            part_row = tl.program_id(2) * num_rows + first + row
            place = part_row[:, None] * max_rank + rank_at[None, :]
            tl.store(shrunk + place, part, mask=rows_in & ranks_in)


def expand_kernel(
    shrunk: "Any",  # [splits, num_rows, max_rank], float32
    b: "Any",  # tables [slots, max_rank, out_features], or addresses [slots]
    ranks: "Any",  # [slots], read with addresses only
    tiles: "Any",
    out: "Any",  # [num_rows, out_features], rows `out_stride` apart; changed in place
    out_stride: "Any",
    num_rows: "Any",
    out_features: "Any",
    max_rank: "Any",
    sign: "Any",
    ADDRESSES: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Program (p, c): tiles p, p + P, ..., block c of the output's columns."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    columns_in = (column < out_features)[None, :]
    row = tl.arange(0, ROWS)
    for tile in range(tl.program_id(0), tl.load(tiles), tl.num_programs(0)):
        first = tl.load(tiles + 3 * tile + 1).to(tl.int64)
        count = tl.load(tiles + 3 * tile + 2)
        slot = tl.load(tiles + 3 * tile + 3).to(tl.int64)
        if ADDRESSES:
            factors = tl.load(b + slot).to(tl.pointer_type(out.dtype.element_ty))
            factors = tl.multiple_of(factors, 16)
            rank = tl.load(ranks + slot)
        else:
            factors = b + slot * max_rank * out_features
            rank = max_rank
        rows_in = (row < count)[:, None]
        if rank > 0:
            # What hangs on nothing that was computed is asked for first.
            place = out + (first + row)[:, None] * out_stride + column[None, :]
            before = tl.load(place, mask=rows_in & columns_in, other=0.0)
            delta = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
            # Not pipelined: the parts of several rounds, in float32, do not fit into shared memory.
            for start in tl.range(0, rank, RANKS, num_stages=1):
                rank_at = start + tl.arange(0, RANKS)
                ranks_in = rank_at < rank
                b_at = factors + rank_at[:, None] * out_features + column[None, :]
                weights = tl.load(b_at, mask=ranks_in[:, None] & columns_in, other=0.0)
                h_at = shrunk + (first + row)[:, None] * max_rank + rank_at[None, :]
                h = tl.full((ROWS, RANKS), 0.0, tl.float32)
                for split in tl.static_range(SPLITS):
                    part_at = h_at + split * num_rows * max_rank
                    h += tl.load(part_at, mask=rows_in & ranks_in[None, :], other=0.0)
                h = h.to(weights.dtype)
                if UPCAST:
                    h, weights = h.to(tl.float32), weights.to(tl.float32)
                delta = tl.dot(h, weights, delta, input_precision="ieee")
            after = (before.to(tl.float32) + sign * delta).to(out.dtype.element_ty)
            tl.store(place, after, mask=rows_in & columns_in)


# These change from step to step: one program is compiled for all of them.
_CHANGING = ["num_rows", "max_rank"]
_shrink: Any = triton.jit(shrink_kernel, do_not_specialize=_CHANGING)
_expand: Any = triton.jit(expand_kernel, do_not_specialize=_CHANGING)
# Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
_INTERPRETED = not isinstance(_shrink, triton.JITFunction)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """Where the factors of a launch are.

    Without `ranks`, `a` [slots, max_rank, in] and `b` [slots, max_rank, out]
    are the factors; with it, int64 addresses [slots] of each slot's own, whose
    ranks are in `ranks` [slots], int32.
    """

    a: torch.Tensor
    b: torch.Tensor
    ranks: torch.Tensor | None
    max_rank: int


def add_deltas(
    out: torch.Tensor,
    x: torch.Tensor,
    factors: Factors,
    tiles: torch.Tensor,
    *,
    num_programs: int,
    rows: int = SHORT,
    sign: float = 1.0,
) -> None:
    """Add the deltas of all tiles to `out` [num_rows, out], in place.

    `tiles` (int32) is what `tiles_of` gives for tiles of `rows` rows;
    `num_programs` walk over them, whatever their number. Nothing is read back
    to the host.
    """
    assert x.stride(-1) == 1 and out.stride(-1) == 1, "rows must be contiguous"
    num_rows, in_features = x.shape
    out_features, max_rank = out.shape[1], factors.max_rank
    split_size = -(-in_features // (_MAX_SPLITS * _STEP)) * _STEP
    splits = -(-in_features // split_size)
    step = _STEP_FLOAT32 if x.dtype == torch.float32 else _STEP
    block = min(_RANKS[-1], max(_RANKS[0], 1 << (max_rank - 1).bit_length()))
    shrunk = x.new_empty(splits, num_rows, max_rank, dtype=torch.float32)
    addresses = factors.ranks is not None
    ranks = tiles if factors.ranks is None else factors.ranks
    _shrink[num_programs, -(-max_rank // block), splits](
        x, factors.a, ranks, tiles, shrunk,
        x.stride(0), num_rows, in_features, max_rank, split_size,
        ADDRESSES=addresses, ROWS=rows, RANKS=block, STEP=step, UPCAST=_INTERPRETED,
    )  # fmt: skip
    _expand[num_programs, -(-out_features // _COLUMNS)](
        shrunk, factors.b, ranks, tiles, out,
        out.stride(0), num_rows, out_features, max_rank, sign,
        ADDRESSES=addresses, SPLITS=splits, ROWS=rows, RANKS=block, COLUMNS=_COLUMNS,
        UPCAST=_INTERPRETED,
    )  # fmt: skip


class TritonSegments:
    """Both kernels over the tiles of a run. Best where launches cost more than arithmetic."""

    name = "triton_segments"
    pads = False

    def __call__(self, out: torch.Tensor, x: torch.Tensor, factors: SlotFactors, run: Run) -> None:
        a, b, *_ = factors
        rows = tile_rows(run.max_length)
        tiles = run.tiles(rows, x.device)
        add_deltas(
            out,
            x,
            Factors(a=a, b=b, ranks=None, max_rank=a.shape[1]),
            tiles,
            num_programs=len(tiles) // 3,
            rows=rows,
            sign=run.sign,
        )


def compile_ahead(
    shapes: Iterable[tuple[int, int]], device: torch.device, dtype: torch.dtype
) -> None:
    """Compile what tables of layers of these (in, out) widths may need while sequences run."""
    tiles = torch.tensor([1, 0, 1, 0], dtype=torch.int32, device=device)
    for (width_in, width_out), rank in product(sorted(set(shapes)), _RANKS):
        x, out, a, b = (
            torch.zeros(size, device=device, dtype=dtype)
            for size in ((1, width_in), (1, width_out), (1, rank, width_in), (1, rank, width_out))
        )
        factors = Factors(a=a, b=b, ranks=None, max_rank=rank)
        for rows in (SHORT, LONG):
            add_deltas(out, x, factors, tiles, num_programs=1, rows=rows)


def try_out(device: torch.device) -> None:
    """Launch both kernels on a single row. Raises what they raise."""
    ones = torch.ones(1, SHORT, SHORT, device=device)
    tiles = torch.tensor([1, 0, 1, 0], dtype=torch.int32, device=device)
    out = torch.zeros(1, SHORT, device=device)
    factors = Factors(a=ones, b=ones, ranks=None, max_rank=SHORT)
    add_deltas(out, ones[0, :1], factors, tiles, num_programs=1)
    if not bool((out == SHORT * SHORT).all()):
        raise RuntimeError("the product is wrong")
