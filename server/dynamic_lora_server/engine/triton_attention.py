"""Attention of one new token a sequence over KV pages, in Triton.

What torch's paged attention does for decoding, for releases of torch that have none and
for float32. The cached tokens of a row are shared out between programs, whose parts a
second kernel adds up (Flash-Decoding, Dao et al. 2023); query heads of one KV head are
the rows of one product. Which cells, and how many, is read from tensors: a captured
launch serves any batch of its size. Imports triton, so it is imported only where there
is one.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from dynamic_lora_server.engine.paged_attention import PagedTables

_SPLITS = 8  # programs that share a row's tokens
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


# Triton's own reductions are interpreted only if it was imported for that.
def _larger_of(a: "Any", b: "Any") -> "Any":
    return tl.maximum(a, b)


def _sum_of(a: "Any", b: "Any") -> "Any":
    return a + b


_larger: Any = triton.jit(_larger_of)
_sum: Any = triton.jit(_sum_of)


def attend_kernel(
    q: "Any",  # [num_rows, kv_heads * group, dim], contiguous
    keys: "Any",  # [num_cells, kv_heads, dim], contiguous
    values: "Any",  # [num_cells, kv_heads, value_dim], contiguous
    pages: "Any",  # [num_rows, max_pages]
    used: "Any",  # [num_rows], tokens in the cache
    highest: "Any",  # [num_rows * heads, SPLITS], float32: the largest score of a part
    weight: "Any",  # the same shape: the sum of e^(score - highest)
    parts: "Any",  # [num_rows * heads, SPLITS, value_dim], float32: values by these weights
    scaling: "Any",
    window: "Any",  # tokens that a row sees at most
    pages_stride: "Any",
    group: "Any",  # query heads of a KV head
    dim: "Any",
    value_dim: "Any",
    page_size: "Any",
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Program (r, h, s): row r, KV head h, part s of the row's tokens."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    stop = tl.load(used + row)
    first = tl.maximum(stop - window, 0)
    share = (stop - first + SPLITS * TOKENS - 1) // (SPLITS * TOKENS) * TOKENS
    begin = first + split * share
    end = tl.minimum(begin + share, stop)
    member, column, place = tl.arange(0, GROUP), tl.arange(0, DIM), tl.arange(0, VALUE_DIM)
    heads_in, columns_in, places_in = member < group, column < dim, place < value_dim
    head = (row * tl.num_programs(1) + kv_head) * group + member
    q_in = heads_in[:, None] & columns_in[None, :]
    query = tl.load(q + head[:, None] * dim + column[None, :], mask=q_in, other=0.0)
    query = query.to(tl.float32) if UPCAST else query
    top, total = tl.full((GROUP,), float("-inf"), tl.float32), tl.full((GROUP,), 0.0, tl.float32)
    sums = tl.full((GROUP, VALUE_DIM), 0.0, tl.float32)
    for start in range(begin, end, TOKENS):
        position = start + tl.arange(0, TOKENS)
        inside = position < end
        page = tl.load(pages + row * pages_stride + position // page_size, mask=inside, other=0)
        at = (page.to(tl.int64) * page_size + position % page_size) * tl.num_programs(1) + kv_head
        k_in, v_in = columns_in[:, None] & inside[None, :], inside[:, None] & places_in[None, :]
        key = tl.load(keys + at[None, :] * dim + column[:, None], mask=k_in, other=0.0)
        value = tl.load(values + at[:, None] * value_dim + place[None, :], mask=v_in, other=0.0)
        if UPCAST:
            key, value = key.to(tl.float32), value.to(tl.float32)
        scores = tl.dot(query, key, input_precision="ieee") * scaling
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.reduce(scores, 1, _larger))
        fade, weights = tl.exp(top - higher), tl.exp(scores - higher[:, None])
        total, top = total * fade + tl.reduce(weights, 1, _sum), higher
        sums *= fade[:, None]
        sums = tl.dot(weights.to(value.dtype), value, sums, input_precision="ieee")
    out = head * SPLITS + split
    tl.store(highest + out, top, mask=heads_in)
    tl.store(weight + out, total, mask=heads_in)
    v_out = heads_in[:, None] & places_in[None, :]
    tl.store(parts + out[:, None] * value_dim + place[None, :], sums, mask=v_out)


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
        highest = q.new_empty(num_rows, heads, _SPLITS, dtype=torch.float32)
        weight = torch.empty_like(highest)
        parts = q.new_empty(num_rows, heads, _SPLITS, value_dim, dtype=torch.float32)
        out = q.new_empty(num_rows, heads, value_dim)
        _attend[num_rows, kv_heads, _SPLITS](
            q.contiguous(), keys, values, tables.block_table, tables.used,
            highest, weight, parts,
            scaling, tables.max_total if window is None else window,
            tables.block_table.stride(0), heads // kv_heads, dim, value_dim, tables.page_size,
            SPLITS=_SPLITS,
            GROUP=max(_LEAST, triton.next_power_of_2(heads // kv_heads)),
            DIM=wide,
            VALUE_DIM=value_wide,
            TOKENS=tokens_at_once(wide, value_wide, keys.element_size()),
            UPCAST=_INTERPRETED,
            num_stages=_STAGES,
        )  # fmt: skip
        _combine[num_rows * heads,](
            highest, weight, parts, out, value_dim,
            SPLITS=_SPLITS,
            VALUE_DIM=value_wide,
        )  # fmt: skip
        return out
