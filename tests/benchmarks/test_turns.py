"""Engines that take turns: real ones, on a tiny base."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import turns
from benchmarks.errors import BenchmarkError
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
        ("eight", "'eight' names neither a number of adapters nor one of ner, describe"),
        ("8+x", "ends with no number of drafted tokens"),
        ("{0}:8", "has no folder 'adapters'"),
    ],
)
def test_sides_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        turns.Traffic.parse(text.format(tmp_path))


def test_a_side_with_drafts_makes_the_same_tokens(tmp_path: Path) -> None:
    base, output = save_tiny_base(tmp_path / "base"), tmp_path / "turns.json"
    long = ["--clients=1", "--requests=2", "--rounds=1", "--prompt-tokens=5", "--output-tokens=60"]
    turns.main(["0", "0+7", "--model", str(base), "--output", str(output), *long])
    plain, drafting = json.loads(output.read_text())["rounds"]
    assert drafting["side"] == "0+7"
    assert drafting["tokens"] == plain["tokens"]
    assert drafting["steps"] <= plain["steps"]


def options(*words: str) -> argparse.Namespace:
    return turns.parser().parse_args(words)


def test_rounds_of_a_task_ask_each_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"prompt {number}" for number in range(6)]
    monkeypatch.setattr(turns, "dev_prompts", lambda *_: prompts)
    given = ["ner", "ner+7", "--data", "data", "--requests", "2"]
    asked = turns.questions(options(*given, "--rounds", "2"))
    assert [each["prompts"] for each in asked] == [prompts[:2], prompts[2:4], prompts[4:]]
    with pytest.raises(BenchmarkError, match="ner has 6 dev prompts, and 4 rounds"):
        turns.questions(options(*given, "--rounds", "3"))


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        (["ner", "describe"], "sides of different tasks"),
        (["ner", "8"], "sides of different tasks"),
        (["ner"], "ner needs --data"),
    ],
)
def test_what_cannot_be_compared_is_refused(sides: list[str], message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        turns.questions(options(*sides))


def test_times_of_steps_are_compared_in_pairs() -> None:
    steps = [[{"s": s, "tokens": 3} for s in side] for side in ([1, 2, 3], [2, 2, 1])]
    first, other = turns.summed_up(["a", "b"], steps)
    assert (first.of_first, first.paired) == (1, 1)
    assert first.tokens_per_s == 9 / 6
    assert (other.of_first, other.paired, other.median_step_ms) == (6 / 5, 1, 2000)


def test_sides_with_other_steps_are_compared_by_their_rates_alone() -> None:
    plain = [{"s": 1.0, "tokens": 1}] * 4
    drafting = [{"s": 1.5, "tokens": 3}, {"s": 1.0, "tokens": 1}]
    first, other = turns.summed_up(["a", "b"], [plain, drafting])
    assert (first.paired, other.paired) == (1, None)
    assert other.of_first == 4 / 2.5
    assert "1.600" in "".join(
        str(cell) for column in turns.table([first, other]).columns for cell in column.cells
    )


def test_sides_alike_stay_apart() -> None:
    assert turns.distinct(["0", "8", "0", "0"]) == ["0", "8", "0 (2)", "0 (3)"]
