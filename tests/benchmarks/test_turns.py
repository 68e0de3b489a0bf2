"""Engines that take turns: real ones, on a tiny base."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import turns
from tests.support.models import save_tiny_base

LOOP = [
    *("--clients=2", "--requests=4", "--rounds=2", "--rank=4"),
    *("--prompt-tokens=5", "--output-tokens=6"),
]


def test_sides_serve_the_same_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, output = save_tiny_base(tmp_path / "base"), tmp_path / "turns.json"
    turns.main(["0", "2", "--model", str(base), "--output", str(output), *LOOP])
    printed = capsys.readouterr().out
    report = json.loads(output.read_text())
    assert [each["side"] for each in report["rounds"]] == ["0", "2"] * 2
    assert all(each["of_first"] == 1 for each in report["rounds"][::2])
    assert all(each["steps"] == report["rounds"][0]["steps"] for each in report["rounds"][:2])
    for each in report["rounds"]:
        assert each["tokens_per_s"] > 0
        assert f"{each['of_first']:.3f}" in printed


def test_a_side_that_cannot_start_is_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="A side ended with exit status 1"):
        turns.main(["0", "--model", str(tmp_path / "none"), *LOOP])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eight", "'eight' does not end with a number of adapters"),
        ("{0}:8", "has no folder 'adapters'"),
    ],
)
def test_sides_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        turns.Traffic.parse(text.format(tmp_path))


def test_times_of_steps_are_compared_in_pairs() -> None:
    steps = [[{"s": s, "tokens": 3} for s in side] for side in ([1, 2, 3], [2, 2, 1])]
    first, other = turns.summed_up(["a", "b"], steps)
    assert (first.of_first, first.paired) == (1, 1)
    assert first.tokens_per_s == 9 / 6
    assert (other.of_first, other.paired, other.median_step_ms) == (6 / 5, 1, 2000)


def test_sides_alike_stay_apart() -> None:
    assert turns.distinct(["0", "8", "0", "0"]) == ["0", "8", "0 (2)", "0 (3)"]
