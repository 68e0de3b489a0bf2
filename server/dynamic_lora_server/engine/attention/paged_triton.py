"""Attention of one new token a sequence over KV pages, in Triton.

What torch's paged attention does for decoding, for releases of torch that have none and
for float32. The cached tokens of a row are shared out between programs, whose parts a
second kernel adds up (Flash-Decoding, Dao et al. 2023); query heads of one KV head are
the rows of one product. Many rows keep the device busy with a program each, and there are
no parts. Which cells, and how many, is read from tensors: a captured launch serves any
batch of its size. Imports triton, so it is imported only where there
is one.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from dynamic_lora_server.engine.attention.paged import PagedTables

# Programs that a launch should have, so that every processor of a large GPU has some, and how
# many may share a row's tokens for it.
_PROGRAMS = 512
_MAX_SPLITS = 32
_MOST_TOKENS = 64  # that each takes at a time
_LEAST = 16  # rows and columns of a product
# Keys and values of so many rounds lie in shared memory at once (Triton's num_stages), of which
# a program of the smallest GPUs that multiply bfloat16 may have 99 KiB.
_STAGES = 3
_SHARED_BYTES = 96 * 1024


def tokens_at_once(dim: int, value_dim: int, num_bytes: int) -> int:
    """Tokens a program takes at a time, whose heads have padded widths of so many numbers."""
    rounds = _STAGES * (dim + value_dim) * num_bytes
    tokens = _MOST_TOKENS
    while tokens > _LEAST and tokens * rounds > _SHARED_BYTES:
        tokens //= 2
    return tokens


def splits_of(num_rows: int, kv_heads: int) -> int:
    """How many programs share the tokens of each row and KV head, a power of two."""
    wanted = -(-_PROGRAMS // (num_rows * kv_heads))
    return min(1 << (wanted - 1).bit_length(), _MAX_SPLITS)


# Triton's own reductions are interpreted only if it was imported for that.
def _larger_of(a: "Any", b: "Any") -> "Any":
    return tl.maximum(a, b)


def _sum_of(a: "Any", b: "Any") -> "Any":
    return a + b


_larger: Any = triton.jit(_larger_of)
_sum: Any = triton.jit(_sum_of)


def _bounds_of(
    stop: "Any", window: "Any", split: "Any", SPLITS: tl.constexpr, TOKENS: tl.constexpr
) -> "Any":
    """The first token that a row sees; where its part begins, and where that ends.

    Parts begin at multiples of TOKENS, so that what is taken at a time lies in one page.
    """
    first = tl.maximum(stop - window, 0)
    aligned = first // TOKENS * TOKENS
    share = (stop - aligned + SPLITS * TOKENS - 1) // (SPLITS * TOKENS) * TOKENS
    begin = aligned + split * share
    return first, begin, tl.minimum(begin + share, stop)


def _leave_part(
    highest: "Any",
    weight: "Any",
    parts: "Any",
    out: "Any",
    part: "Any",
    at: "Any",
    top: "Any",
    total: "Any",
    sums: "Any",
    heads_in: "Any",
    v_out: "Any",
    SPLITS: tl.constexpr,
) -> None:
    """Write what `combine_kernel` adds up, or, if it is all, what comes of it.

    A part without tokens has a weight of nothing.
    """
    if SPLITS == 1:
        tl.store(out + at, (sums / total[:, None]).to(out.dtype.element_ty), mask=v_out)
    else:
        tl.store(highest + part, top, mask=heads_in)
        tl.store(weight + part, total, mask=heads_in)
        tl.store(parts + at, sums, mask=v_out)


_bounds: Any = triton.jit(_bounds_of)
_leave: Any = triton.jit(_leave_part)


def attend_kernel(
    q: "Any",  # [num_rows, kv_heads * group, dim], contiguous
    keys: "Any",  # [num_cells, kv_heads, dim], contiguous
    values: "Any",  # [num_cells, kv_heads, value_dim], contiguous
    pages: "Any",  # [num_rows, max_pages]
    used: "Any",  # [num_rows], tokens in the cache
    highest: "Any",  # [num_rows * heads, SPLITS], float32: the largest score of a part
    weight: "Any",  # the same shape: the sum of e^(score - highest)
    parts: "Any",  # [num_rows * heads, SPLITS, value_dim], float32: values by these weights
    out: "Any",  # [num_rows * heads, value_dim], contiguous: written if there is one part
    scaling: "Any",
    window: "Any",  # tokens that a row sees at most
    pages_stride: "Any",
    group: "Any",  # query heads of a KV head
    dim: "Any",
    value_dim: "Any",
    SPLITS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Program (r, h, s): row r, KV head h, part s of the row's tokens."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, begin, end = _bounds(tl.load(used + row), window, split, SPLITS, TOKENS)
    member, column, place = tl.arange(0, GROUP), tl.arange(0, DIM), tl.arange(0, VALUE_DIM)
    heads_in, columns_in, places_in = member < group, column < dim, place < value_dim
    head = (row * tl.num_programs(1) + kv_head) * group + member
    q_in = heads_in[:, None] & columns_in[None, :]
    query = tl.load(q + head[:, None] * dim + column[None, :], mask=q_in, other=0.0)
    query = query.to(tl.float32) if UPCAST else query
    top, total = tl.full((GROUP,), float("-inf"), tl.float32), tl.full((GROUP,), 0.0, tl.float32)
    sums = tl.full((GROUP, VALUE_DIM), 0.0, tl.float32)
    token = tl.arange(0, TOKENS)
    k_from = token[None, :] * (tl.num_programs(1) * dim) + column[:, None]
    v_from = token[:, None] * (tl.num_programs(1) * value_dim) + place[None, :]
    for start in range(begin, end, TOKENS):
        inside = (start + token >= first) & (start + token < end)
        page = tl.load(pages + row * pages_stride + start // PAGE_SIZE).to(tl.int64)
        at = (page * PAGE_SIZE + start % PAGE_SIZE) * tl.num_programs(1) + kv_head
        k_in, v_in = columns_in[:, None] & inside[None, :], inside[:, None] & places_in[None, :]
        key = tl.load(keys + at * dim + k_from, mask=k_in, other=0.0)
        value = tl.load(values + at * value_dim + v_from, mask=v_in, other=0.0)
        if UPCAST:
            key, value = key.to(tl.float32), value.to(tl.float32)
        scores = tl.dot(query, key, input_precision="ieee") * scaling
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.reduce(scores, 1, _larger))
        fade, weights = tl.exp(top - higher), tl.exp(scores - higher[:, None])
        total, top = total * fade + tl.reduce(weights, 1, _sum), higher
        sums *= fade[:, None]
        sums = tl.dot(weights.to(value.dtype), value, sums, input_precision="ieee")
    part = head * SPLITS + split
    at = part[:, None] * value_dim + place[None, :]
    v_out = heads_in[:, None] & places_in[None, :]
    _leave(highest, weight, parts, out, part, at, top, total, sums, heads_in, v_out, SPLITS)


def combine_kernel(
    highest: "Any",  # as `attend_kernel` leaves them
    weight: "Any",
    parts: "Any",
    out: "Any",  # [num_rows * heads, value_dim], contiguous
    value_dim: "Any",
    SPLITS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
) -> None:
    """Program i: the parts of row and head i."""
    row = tl.program_id(0)
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, VALUE_DIM)
    column_in = column < value_dim
    tops = tl.load(highest + row * SPLITS + split)
    # A part without tokens has a weight of nothing: e^(-inf).
    scale = tl.exp(tops - tl.reduce(tops, 0, _larger))
    total = tl.reduce(tl.load(weight + row * SPLITS + split) * scale, 0, _sum)
    part_at = parts + (row * SPLITS + split)[:, None] * value_dim + column[None, :]
    found = tl.load(part_at, mask=column_in[None, :], other=0.0)
    summed = tl.reduce(found * scale[:, None], 0, _sum) / total
    tl.store(out + row * value_dim + column, summed.to(out.dtype.element_ty), mask=column_in)


_attend: Any = triton.jit(attend_kernel)
_combine: Any = triton.jit(combine_kernel)
# Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
_INTERPRETED = not isinstance(_attend, triton.JITFunction)


@dataclass(frozen=True, slots=True)
class TritonPages:
    """What `PagedKernel` computes, for one new token a sequence."""

    tables: PagedTables

    def __call__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """q [num_rows, heads, dim] over cells [num_cells, kv_heads, dim] -> like q."""
        tables = self.tables
        num_rows, heads, dim = q.shape
        kv_heads, value_dim = values.shape[1:]
        wide, value_wide = (max(_LEAST, triton.next_power_of_2(w)) for w in (dim, value_dim))
        tokens = tokens_at_once(wide, value_wide, keys.element_size())
        assert tables.page_size % tokens == 0, "what is taken at a time lies in one page"
        splits = splits_of(num_rows, kv_heads)
        shared = splits if splits > 1 else 0  # nothing is kept apart of one part
        highest = q.new_empty(num_rows, heads, shared, dtype=torch.float32)
        weight = torch.empty_like(highest)
        parts = q.new_empty(num_rows, heads, shared, value_dim, dtype=torch.float32)
        out = q.new_empty(num_rows, heads, value_dim)
        _attend[num_rows, kv_heads, splits](
            q.contiguous(), keys, values, tables.block_table, tables.used,
            highest, weight, parts, out,
            scaling, tables.max_total if window is None else window,
            tables.block_table.stride(0), heads // kv_heads, dim, value_dim,
            SPLITS=splits,
            PAGE_SIZE=tables.page_size,
            GROUP=max(_LEAST, triton.next_power_of_2(heads // kv_heads)),
            DIM=wide,
            VALUE_DIM=value_wide,
            TOKENS=tokens,
            UPCAST=_INTERPRETED,
            num_stages=_STAGES,
        )  # fmt: skip
        if splits > 1:
            _combine[num_rows * heads,](
                highest, weight, parts, out, value_dim,
                SPLITS=splits,
                VALUE_DIM=value_wide,
            )  # fmt: skip
        return out
