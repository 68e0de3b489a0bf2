"""Captured steps and paged attention, which need CUDA."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dynamic_lora_server.engine.build import BuiltEngine
from dynamic_lora_server.engine.engine import FailedEvent
from dynamic_lora_server.engine.paged_attention import PAGE_SIZE, PagedKernel, PagedTables
from dynamic_lora_server.engine.sequence import Sequence
from dynamic_lora_server.engine.static_attention import GatheredPages
from dynamic_lora_server.modes import Mode
from tests.support.adapters import make_adapter
from tests.support.engines import admit, make_engine, make_sequence, random_prompt, run_all
from tests.support.models import tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CUDA = torch.device("cuda")


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
    torch.cuda.set_sync_debug_mode("error")
    try:
        events = [event for _ in range(5) for event in built.engine.step()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not any(isinstance(event, FailedEvent) for event in events), events
    assert [len(row.output_ids) for row in rows] == [number + 5 for number in before]


@pytest.mark.parametrize("window", [None, 100])
def test_the_paged_kernel_equals_gathered_pages(window: int | None) -> None:
    generator = torch.Generator(CUDA).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=CUDA, dtype=torch.bfloat16)

    def whole(values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=CUDA)

    tables = PagedTables(
        cumulative=whole([0, 1, 2, 3]),
        used=whole([1, 300, PAGE_SIZE]),
        block_table=whole([[3, 0], [1, 2], [0, 0]]),
        max_new=1,
        max_total=2 * PAGE_SIZE,
        page_size=PAGE_SIZE,
    )
    q, keys, values = draw(3, 8, 64), draw(4 * PAGE_SIZE, 2, 64), draw(4 * PAGE_SIZE, 2, 64)
    arguments = (q, keys, values, 0.125, window)
    torch.testing.assert_close(
        PagedKernel(tables)(*arguments), GatheredPages(tables)(*arguments), atol=2e-2, rtol=2e-2
    )
