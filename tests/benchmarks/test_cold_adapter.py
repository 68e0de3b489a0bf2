"""A cold adapter: the delay over the pairs, and the bar that it is held against."""

from pathlib import Path

import pytest

from benchmarks.cold_adapter import Pair, Result, forget_files, to_markdown


def _result(*delays: float, read_s: float = 0.02) -> Result:
    pairs = [
        Pair(cold_ttft_s=0.1 + delay, read_s=read_s, warm_ttft_s=0.1, step_s=0.03)
        for delay in delays
    ]
    return Result(num_other_clients=8, pairs=pairs, read_alone_s=0.015)


@pytest.mark.parametrize(("delay", "reached"), [(0.049, True), (0.051, False)])
def test_one_step_and_the_reading_are_allowed(delay: float, *, reached: bool) -> None:
    assert _result(delay).reached == reached


def test_the_median_of_the_pairs_counts() -> None:
    result = _result(0.01, 0.02, 0.9)
    assert result.later_s == pytest.approx(0.02)
    assert result.step_s == pytest.approx(0.03)


def test_the_table() -> None:
    row = "| 8 | 100 | 120 | 20 | 20 | 30 | 50 | yes | 15 |"
    assert row in to_markdown([_result(0.01, 0.02, 0.9)]).splitlines()


def test_forgetting_files_leaves_them_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("content")
    forget_files(tmp_path)
    assert (tmp_path / "folder" / "file").read_text() == "content"
