"""Captured steps and paged attention, which need CUDA."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamic_lora_adapters.kernels import has_triton
from dynamic_lora_server.engine.attention.paged import (
    PAGE_SIZE,
    PagedKernel,
    PagedTables,
    paged_kernel_available,
)
from dynamic_lora_server.engine.engine import FailedEvent
from dynamic_lora_server.engine.graphs.decode_graphs import refusing_waits
from dynamic_lora_server.engine.graphs.static_attention import GatheredPages, StaticKernel
from dynamic_lora_server.engine.sequence import Sequence
from dynamic_lora_server.engine.startup.build import BuiltEngine
from dynamic_lora_server.modes import Mode
from tests.support.adapters import make_adapter
from tests.support.engines import admit, make_engine, make_sequence, random_prompt, run_all
from tests.support.models import tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CUDA = torch.device("cuda")
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


def decode_logits(
    folders: list[Path], *, graphs: bool | None, compiled: bool = False
) -> torch.Tensor:
    """Logits of the first decoding step of a base row and a row of each adapter."""
    # Heads of 64, in 16 bits: flash attention takes no others as small.
    model = tiny_llama(hidden_size=256)
    torch.nn.Module.to(model, CUDA, torch.bfloat16)
    built = make_engine(
        model,
        kv_memory=2**26,
        prefill_chunk=64,  # all prompts in one step
        decode_graphs=graphs,
        compile_layers=compiled,
        overlap=False,
        mode=Mode.BYPASS,
    )
    adapters = [None, *(admit(built, folder) for folder in folders)]
    rows = [make_sequence(random_prompt(9, seed=1), adapter=one) for one in adapters]
    for row in rows:
        built.engine.add(row)
    built.engine.step()
    for row in rows:
        row.output_ids[0] = 7  # the same for both engines, whatever they had chosen
    runner = built.engine.runner
    sampled, logits = runner.run(built.engine.scheduler.schedule())
    assert (runner.graphs is not None) == (graphs is None)
    if runner.graphs is not None:
        assert runner.graphs.stats().num_replayed == 1
    order = [[piece.sequence for piece in sampled].index(row) for row in rows]
    return logits[order].clone()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_graphs_give_the_logits_of_other_steps(tmp_path: Path, compiled: bool) -> None:
    base = tiny_llama(hidden_size=256)
    folders = [make_adapter(tmp_path / str(n), base, rank=4 + 8 * n, seed=n) for n in range(3)]
    replayed = decode_logits(folders, graphs=None, compiled=compiled)
    plain = decode_logits(folders, graphs=False)
    error = (replayed - plain).abs().max() / plain.abs().max()
    assert float(error) < 0.05
    assert (replayed[0] - replayed[1:]).abs().amax(1).min() / plain.abs().max() > 0.05


def overlapping(folders: list[Path], *, overlap: bool) -> tuple[BuiltEngine, list[Sequence]]:
    """An engine in 16 bits with its rows, the base's and each adapter's, added."""
    model = tiny_llama(hidden_size=256)
    torch.nn.Module.to(model, CUDA, torch.bfloat16)
    built = make_engine(model, kv_memory=2**26, overlap=overlap, mode=Mode.BYPASS)
    adapters = [None, *(admit(built, folder) for folder in folders)]
    ways: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "top_k": 5, "logprobs": True, "top_logprobs": 2},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.2},
    ]
    rows = [
        make_sequence(random_prompt(9, seed=1), adapter=one, max_new_tokens=40, **params)
        for one in adapters
        for params in ways
    ]
    for row in rows:
        built.engine.add(row)
    return built, rows


def test_overlapping_steps_give_the_tokens_of_steps_one_by_one(tmp_path: Path) -> None:
    folders = [make_adapter(tmp_path / str(n), tiny_llama(hidden_size=256)) for n in range(2)]
    found = []
    for overlap in (False, True):
        built, rows = overlapping(folders, overlap=overlap)
        run_all(built, [])
        found.append([row.output_ids for row in rows])
        assert (built.engine.num_overlapped > 0) is overlap
    assert found[0] == found[1]


def test_starting_a_step_does_not_wait_for_the_device(tmp_path: Path) -> None:
    folders = [make_adapter(tmp_path / "a", tiny_llama(hidden_size=256))]
    built, rows = overlapping(folders, overlap=True)
    for _ in range(5):
        built.engine.step()
    before = [len(row.output_ids) for row in rows]
    # Prompts run outside of graphs, beside the decoding rows.
    late = [make_sequence(random_prompt(40, seed=2), adapter=row.adapter) for row in rows[::3]]
    for row in late:
        built.engine.add(row)
    with refusing_waits():
        events = [event for _ in range(5) for event in built.engine.step()]
    assert not any(isinstance(event, FailedEvent) for event in events), events
    assert [len(row.output_ids) for row in rows] == [number + 5 for number in before]


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def tables_on(device: torch.device, num_rows: int) -> PagedTables:
    """Rows with a token, with a page and a part, and with a page, in turns, on four pages."""

    def whole(values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    kinds = [(1, [3, 0]), (300, [1, 2]), (PAGE_SIZE, [0, 0])]
    rows = [kinds[row % len(kinds)] for row in range(num_rows)]
    return PagedTables(
        cumulative=whole([*range(num_rows + 1)]),
        used=whole([used for used, _ in rows]),
        block_table=whole([pages for _, pages in rows]),
        max_new=1,
        max_total=2 * PAGE_SIZE,
        page_size=PAGE_SIZE,
    )


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("num_rows", [3, 256])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("torch", torch.bfloat16), ("Triton", torch.bfloat16), ("Triton", torch.float32)],
    ids=str,
)
def test_kernels_on_pages_equal_gathered_pages(
    name: str, dtype: torch.dtype, kv_heads: int, dim: int, num_rows: int, window: int | None
) -> None:
    if name == "torch" and not paged_kernel_available(CUDA):
        pytest.skip("this torch has no attention to pages")
    if name == "Triton" and not has_triton(CUDA):
        pytest.skip("Triton does not run here")
    q = draw(num_rows, 8, dim, dtype=dtype)
    keys = draw(4 * PAGE_SIZE, kv_heads, dim, dtype=dtype)
    values = draw(4 * PAGE_SIZE, kv_heads, dim, dtype=dtype).flip(0)
    kernel: Callable[[PagedTables], StaticKernel] = PagedKernel
    if name == "Triton":
        from dynamic_lora_server.engine.attention.paged_triton import TritonPages

        kernel = TritonPages
    tables = tables_on(CUDA, num_rows)
    actual = kernel(tables)(q.to(CUDA), keys.to(CUDA), values.to(CUDA), 0.125, window)
    # In float32, and on the CPU, so that it does not hang on what the GPU rounds.
    reference = GatheredPages(tables_on(torch.device("cpu"), num_rows))
    expected = reference(q.float(), keys.float(), values.float(), 0.125, window)
    assert actual.dtype is dtype
    torch.testing.assert_close(actual.float().cpu(), expected, atol=TOLERANCE[dtype], rtol=0)
