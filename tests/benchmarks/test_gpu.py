"""The GPU benchmark on a CPU, at toy size: the same code, and figures of no meaning."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.errors import BenchmarkError
from benchmarks.gpu import TINY_PLAN, failures, main, without_graphs
from benchmarks.gpu_engine import CELLS, StepTime, table
from benchmarks.gpu_shapes import ModelShape


def test_every_figure_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up = mock.Mock(side_effect=LlamaForCausalLM.init_continuous_batching)

    def counted(*arguments: Any, **options: Any) -> Any:
        return set_up(*arguments, **options)

    monkeypatch.setattr(LlamaForCausalLM, "init_continuous_batching", counted)
    output = tmp_path / "gpu.json"
    assert main(["--device", "cpu", "--tiny", "--output", str(output)]) == 0
    assert "tiny on CPU" in capsys.readouterr().out
    document = json.loads(output.read_text())
    assert document["chip"] == "CPU"
    (found,) = document["shapes"]
    cells = {(cell["cell"], cell["rows"]) for cell in found["cells"]}
    assert cells == {(cell.name, rows) for cell in CELLS for rows in TINY_PLAN.rows}
    assert all(cell["step_ms"] > 0 and cell["of_base"] > 0 for cell in found["cells"])
    assert all(0 < cell["host_ms"] <= cell["step_ms"] for cell in found["cells"])
    assert "left_out" not in found
    assert found["one_row_of_bandwidth_limit"] > 0
    assert {"adapters", "rows_each", "best", "segment_loop"} <= set(found["kernels_us"][0])
    peers = {peer["peer"]: peer.get("tokens_per_s") for peer in found["peers"]}
    assert set(peers) == {"transformers generate", "generate_batch", "PEFT generate, 8 mixed"}
    assert all(speed is not None for speed in peers.values()), found["peers"]
    assert set_up.call_count == 1, "what is timed holds no set-up"


def test_what_finds_no_time_is_left_out_by_name(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    main(["--device", "cpu", "--tiny", "--minutes", "0", "--output", str(output)])
    (found,) = json.loads(output.read_text())["shapes"]
    assert found["num_rounds"] == 1
    assert [(cell["cell"], cell["rows"]) for cell in found["cells"]] == [("base", 1)]
    assert found["left_out"][0] == "base, 2 rows"
    assert len(found["left_out"]) == len(CELLS) * len(TINY_PLAN.rows) - 1
    assert {peer["left_out"] for peer in found["peers"]} == {"out of time"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert "there is no CUDA device; --device cpu --tiny" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_layers_are_compiled_for_cuda_graphs_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--tiny", "--compile"]) == 1
    assert "error: tiny: compile is for decoding in CUDA graphs" in capsys.readouterr().err


def test_what_was_measured_before_a_failure_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "gpu.json"

    def no_memory(*_: Any, **__: Any) -> None:
        (before,) = json.loads(output.read_text())["shapes"]
        assert before["cells"]
        raise torch.OutOfMemoryError("no memory for peers")

    monkeypatch.setattr("benchmarks.gpu_peers.measure_peers", no_memory)
    assert main(["--device", "cpu", "--tiny", "--output", str(output)]) == 1
    (found,) = json.loads(output.read_text())["shapes"]
    assert found["cells"]
    assert found["failed"] == "OutOfMemoryError('no memory for peers')"
    assert "error: tiny: OutOfMemoryError" in capsys.readouterr().err


def test_shapes_are_measured_alone_and_one_that_fails_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[str] = []

    def fails(shape: ModelShape, *_: Any) -> Iterator[dict[str, Any]]:
        tried.append(shape.name)
        if shape.name == "llama-1b":
            raise BenchmarkError("too large")
        yield {"peers": []}

    monkeypatch.setattr("benchmarks.gpu.measure_shape", fails)
    monkeypatch.setattr("benchmarks.gpu.copy_bandwidth", lambda *_: 1.0)
    output = tmp_path / "gpu.json"
    assert main(["--device", "cpu", "--output", str(output)]) == 1
    assert tried == ["llama-1b", "llama-8b"]
    first, second = json.loads(output.read_text())["shapes"]
    assert first["failed"] == "too large"
    assert second["peers"] == []
    assert "error: llama-1b: too large" in capsys.readouterr().err
    assert main(["--device", "cpu", "--shape", "llama-8b"]) == 0
    assert tried[2:] == ["llama-8b"]


def test_figures_without_graphs_are_called_so() -> None:
    assert without_graphs(None) == "no CUDA graphs were captured; the log says why"
    declined = without_graphs({"replayed": 0, "declined": {"large rank": 9}})
    assert declined == "no CUDA graph was replayed: {'large rank': 9}"
    assert without_graphs({"replayed": 1, "declined": {"prompts": 2}}) is None
    some = without_graphs({"replayed": 1, "declined": {"prompts": 2, "large rank": 3}})
    assert some == "steps of some cells were no CUDA graphs: {'large rank': 3}"
    shape = {"shape": {"name": "llama-1b"}, "without_graphs": declined}
    assert failures({"shapes": [shape]}) == [f"llama-1b: {declined}"]


def test_ratios_are_taken_within_a_round() -> None:
    rounds = [
        {("base", 1): StepTime(1.0, 0.5), ("merged", 1): StepTime(2.0, 0.5)},
        {("base", 1): StepTime(10.0, 0.5), ("merged", 1): StepTime(10.0, 0.7)},
        {("base", 1): StepTime(3.0, 0.5), ("merged", 1): StepTime(4.0, 0.6)},
        {("base", 1): StepTime(9.0, 9.0)},  # out of time
    ]
    base, merged = table(rounds)
    assert base["of_base"] == 1.0
    assert (merged["step_ms"], merged["of_base"]) == (4000.0, 0.75)
    assert (base["host_ms"], merged["host_ms"]) == (500.0, 600.0)
