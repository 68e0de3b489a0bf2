"""The GPU benchmark on a CPU, at toy size: the same code, and figures of no meaning."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import TINY_PLAN, main
from benchmarks.gpu_engine import CELLS, table


def test_every_figure_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "gpu.json"
    assert main(["--device", "cpu", "--tiny", "--output", str(output)]) == 0
    assert "tiny on CPU" in capsys.readouterr().out
    document = json.loads(output.read_text())
    assert document["chip"] == "CPU"
    (found,) = document["shapes"]
    cells = {(cell["cell"], cell["rows"]) for cell in found["cells"]}
    assert cells == {(cell.name, rows) for cell in CELLS for rows in TINY_PLAN.rows}
    assert all(cell["step_ms"] > 0 and cell["of_base"] > 0 for cell in found["cells"])
    assert found["one_row_of_bandwidth_limit"] > 0
    assert {"adapters", "rows_each", "best", "segment_loop"} <= set(found["kernels_us"][0])
    peers = {peer["peer"]: peer.get("tokens_per_s") for peer in found["peers"]}
    assert set(peers) == {"transformers generate", "generate_batch", "PEFT generate, 8 mixed"}
    assert all(speed is not None for speed in peers.values()), found["peers"]


def test_peers_that_find_no_time_are_left_out_by_name(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    main(["--device", "cpu", "--tiny", "--minutes", "0", "--output", str(output)])
    (found,) = json.loads(output.read_text())["shapes"]
    assert found["num_rounds"] == 1
    assert {peer["left_out"] for peer in found["peers"]} == {"out of time"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert "there is no CUDA device; --device cpu --tiny" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_layers_are_compiled_for_cuda_graphs_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--tiny", "--compile"]) == 1
    assert "error: compile is for decoding in CUDA graphs" in capsys.readouterr().err


def test_ratios_are_taken_within_a_round() -> None:
    rounds = [
        {("base", 1): 1.0, ("merged", 1): 2.0},
        {("base", 1): 10.0, ("merged", 1): 10.0},
        {("base", 1): 3.0, ("merged", 1): 4.0},
    ]
    base, merged = table(rounds)
    assert base["of_base"] == 1.0
    assert (merged["step_ms"], merged["of_base"]) == (4000.0, 0.75)
