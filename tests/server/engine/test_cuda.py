"""Captured steps and paged attention, which need CUDA."""

from pathlib import Path

import pytest
import torch

from dynamic_lora_server.engine.paged_attention import PAGE_SIZE, PagedKernel, PagedTables
from dynamic_lora_server.engine.static_attention import GatheredPages
from dynamic_lora_server.modes import Mode
from tests.support.adapters import make_adapter
from tests.support.engines import admit, make_engine, make_sequence, random_prompt
from tests.support.models import tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CUDA = torch.device("cuda")


def decode_logits(folders: list[Path], *, graphs: bool | None) -> torch.Tensor:
    """Logits of the first decoding step of a base row and a row of each adapter."""
    # Heads of 64, in 16 bits: flash attention takes no others as small.
    model = tiny_llama(hidden_size=256)
    torch.nn.Module.to(model, CUDA, torch.bfloat16)
    built = make_engine(model, kv_memory=2**26, decode_graphs=graphs, mode=Mode.BYPASS)
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


def test_graphs_give_the_logits_of_other_steps(tmp_path: Path) -> None:
    base = tiny_llama(hidden_size=256)
    folders = [make_adapter(tmp_path / str(n), base, rank=4 + 8 * n, seed=n) for n in range(3)]
    replayed = decode_logits(folders, graphs=None)
    plain = decode_logits(folders, graphs=False)
    error = (replayed - plain).abs().max() / plain.abs().max()
    assert float(error) < 0.05
    assert (replayed[0] - replayed[1:]).abs().amax(1).min() / plain.abs().max() > 0.05


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
