"""Attention over pages in Triton: in its interpreter against plain operations, and compiled."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from dynamic_lora_server.engine.attention import paged
from dynamic_lora_server.engine.attention.paged import PagedTables
from dynamic_lora_server.engine.graphs.static_attention import GatheredPages
from tests.support.triton import CAPABILITIES, compile_for_a_gpu, interpreted

if TYPE_CHECKING:
    from dynamic_lora_server.engine.attention.paged_triton import TritonPages

PAGE = 256
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[type["TritonPages"]]:
    """The kernel, interpreted, in few programs: each takes its time."""
    with interpreted():
        from dynamic_lora_server.engine.attention import paged_triton

        monkeypatch.setattr(paged_triton, "_MAX_SPLITS", 4)
        yield paged_triton.TritonPages


def tables_for(used: list[int], num_pages: int) -> PagedTables:
    """Rows with so many tokens, on pages in no order; what a row does not use is page 0."""
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0)).tolist()
    width = max(-(-tokens // PAGE) for tokens in used)
    table = [
        [order.pop() if place < -(-tokens // PAGE) else 0 for place in range(width)]
        for tokens in used
    ]
    return PagedTables(
        cumulative=torch.arange(len(used) + 1, dtype=torch.int32),
        used=torch.tensor(used, dtype=torch.int32),
        block_table=torch.tensor(table, dtype=torch.int32),
        max_new=1,
        max_total=width * PAGE,
        page_size=PAGE,
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim", "window", "dtype"),
    [
        (4, 4, 64, 64, None, torch.float32),
        (9, 3, 64, 64, None, torch.float32),
        (8, 1, 80, 48, None, torch.float32),
        (4, 2, 64, 64, 100, torch.float32),
        (4, 2, 16, 16, 1, torch.float32),
        (4, 2, 128, 128, None, torch.bfloat16),
        (4, 2, 64, 64, 300, torch.float16),
    ],
    ids=str,
)
def test_it_equals_gathered_pages(
    kernel: type["TritonPages"],
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(1)
    used = [1, 64, 65, PAGE, 600]
    tables = tables_for(used, 8)
    q = torch.randn(len(used), heads, dim, generator=generator).to(dtype)
    keys = torch.randn(8 * PAGE, kv_heads, dim, generator=generator).to(dtype)
    values = torch.randn(8 * PAGE, kv_heads, value_dim, generator=generator).to(dtype)
    # Cells that nobody has written may hold anything.
    for row, tokens in enumerate(used):
        last = int(tables.block_table[row, (tokens - 1) // PAGE]) * PAGE
        keys[last + (tokens - 1) % PAGE + 1 : last + PAGE] = torch.nan
        values[last + (tokens - 1) % PAGE + 1 : last + PAGE] = torch.nan
    expected = GatheredPages(tables)(q, keys, values, 0.2, window)
    actual = kernel(tables)(q, keys, values, 0.2, window)
    assert actual.dtype is dtype
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("window", [1, 65, 257, 599])
def test_a_window_may_begin_anywhere_in_a_page(kernel: type["TritonPages"], window: int) -> None:
    tables = tables_for([600, 64, 257], 6)
    q = torch.randn(3, 2, 16)
    keys, values = torch.randn(6 * PAGE, 1, 16), torch.randn(6 * PAGE, 1, 16)
    expected = GatheredPages(tables)(q, keys, values, 0.2, window)
    actual = kernel(tables)(q, keys, values, 0.2, window)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("most", [1, 2, 32])
def test_parts_of_any_number_are_added_up(
    kernel: type["TritonPages"], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """A short row has parts without a token; of one part nothing is added up."""
    from dynamic_lora_server.engine.attention import paged_triton

    monkeypatch.setattr(paged_triton, "_MAX_SPLITS", most)
    assert paged_triton.splits_of(2, 2) == most
    tables = tables_for([1, 600], 4)
    q = torch.randn(2, 6, 32)
    keys, values = torch.randn(4 * PAGE, 2, 32), torch.randn(4 * PAGE, 2, 32)
    for window in (None, 70):
        expected = GatheredPages(tables)(q, keys, values, 0.2, window)
        actual = kernel(tables)(q, keys, values, 0.2, window)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_few_rows_are_shared_between_more_programs() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from dynamic_lora_server.engine.attention.paged_triton import splits_of

    assert [splits_of(rows, 8) for rows in (1, 2, 8, 33, 64, 256)] == [32, 32, 8, 2, 1, 1]
    assert splits_of(7, 1) == 32


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_it_passes_what_is_tried_at_start(dtype: torch.dtype) -> None:
    assert paged.triton_pages_available.__wrapped__(torch.device("cpu"), dtype)


def test_rows_need_not_lie_side_by_side(kernel: type["TritonPages"]) -> None:
    tables = tables_for([30, 70], 2)
    q = torch.randn(4, 2, 64).transpose(0, 1)
    keys, values = torch.randn(2 * PAGE, 2, 64), torch.randn(2 * PAGE, 2, 64)
    expected = GatheredPages(tables)(q, keys, values, 0.125, None)
    torch.testing.assert_close(kernel(tables)(q, keys, values, 0.125, None), expected)


@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize(("dtype", "num_bytes"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_for_a_gpu(
    dtype: str,
    num_bytes: int,
    width: int,
    splits: int,
    capability: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from dynamic_lora_server.engine.attention import paged_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = dict.fromkeys(("q", "keys", "values", "out"), dtype)
    pointers |= dict.fromkeys(("highest", "weight", "parts"), "fp32")
    pointers |= dict.fromkeys(("pages", "used"), "i32")
    tokens = paged_triton.tokens_at_once(width, width, num_bytes)
    shapes = {
        "SPLITS": splits,
        "PAGE_SIZE": PAGE,
        "GROUP": 16,
        "DIM": width,
        "VALUE_DIM": width,
        "TOKENS": tokens,
    }
    shapes_of_one = shapes | {"UPCAST": False}
    sizes = ["dim", "value_dim"]
    assert compile_for_a_gpu(paged_triton.attend_kernel, pointers, shapes_of_one, capability, sizes)
    few = {name: shapes[name] for name in ("SPLITS", "VALUE_DIM")}
    assert compile_for_a_gpu(paged_triton.combine_kernel, pointers, few, capability, sizes)
