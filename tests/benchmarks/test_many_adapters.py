"""Many adapters: other content at small cost, and shares of the smallest home's rate."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from benchmarks.many_adapters import (
    Cell,
    adapter_names,
    parser,
    relative_rates,
    to_markdown,
    warm_up,
)
from benchmarks.peers.adapters import halved, with_other_values
from benchmarks.stats import Timing, summarise
from benchmarks.workload import Popularity, PromptMaker, Workload


def _cell(num_adapters: int, number: int, rate: float) -> Cell:
    timing = Timing(sent=0, first_token=0.5, last_token=1.0, num_output_tokens=10)
    return Cell(
        num_adapters=num_adapters,
        round=number,
        start_s=3.0 + number,
        idle_bytes=2**30,
        loaded_bytes=2**31,
        summary=summarise([timing], wall_s=10 / rate),
    )


def test_rates_are_relative_to_the_smallest_home_in_the_same_round() -> None:
    cells = [_cell(8, 0, 100.0), _cell(100, 0, 95.0), _cell(100, 1, 40.0), _cell(8, 1, 50.0)]
    shares = relative_rates(cells)
    assert shares[8] == pytest.approx([1.0, 1.0])
    assert shares[100] == pytest.approx([0.95, 0.8])


def test_a_round_without_the_smallest_home_has_no_share() -> None:
    assert relative_rates([_cell(8, 0, 1.0), _cell(9, 1, 1.0)]) == {8: [1.0]}


def test_the_table() -> None:
    text = to_markdown([_cell(8, 0, 100.0), _cell(5000, 0, 90.0)], "settings")
    row = "| 5,000 | 90.0 | 0.90 | 500 / 500 | 3.0 | 1024, under load 2048 |"
    assert row in text.splitlines()
    assert text.endswith("settings")


def test_other_values_change_one_factor_alone(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    names = ("layers.0.q.lora_A.weight", "layers.0.q.lora_B.weight", "layers.1.q.lora_B.weight")
    save_file({name: torch.ones(4, 8) for name in names}, path)
    original = halved(path)
    first, second, again = (with_other_values(original, seed) for seed in (1, 2, 1))
    assert first == again != second
    tensors = load(first)
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
    changed = [name for name in names if not torch.equal(tensors[name], load(original)[name])]
    assert changed == ["layers.0.q.lora_B.weight"]
    assert torch.isfinite(tensors[changed[0]]).all()


class _OneWord:
    def get_vocab(self) -> dict[str, int]:
        return {"word": 0}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return tokens[0]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        del add_special_tokens
        return [0] * len(text.split())


def test_the_warm_up_is_short_and_spread_as_the_cell_is() -> None:
    workload = Workload(
        num_clients=4, popularity=Popularity("zipf", 1.0), num_adapters=100, num_requests=9
    )
    found = warm_up(workload, PromptMaker(_OneWord(), 4))
    assert len(found) == 8
    assert {request.num_output_tokens for request in found} == {8}
    assert all(request.adapter is not None for request in found)


def test_the_options() -> None:
    options = parser().parse_args(["--counts", "100,8,8", "--modules", "q_proj"])
    assert (options.counts, options.modules) == ([8, 100], ["q_proj"])
    assert adapter_names(2) == ["many-00000", "many-00001"]
