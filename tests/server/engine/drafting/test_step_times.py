"""Times of steps: measured ones, and what is learned from steps that turn out otherwise."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamic_lora_server.engine.drafting.step_times import StepTimes

POINTS = ((1, 1.0), (4, 1.0), (8, 2.0), (16, 6.0))


def test_measured_points_are_joined_by_straight_lines() -> None:
    times = StepTimes(POINTS)
    assert [times.of(rows) for rows in (1, 3, 4, 6, 8, 12, 16)] == [1, 1, 1, 1.5, 2, 4, 6]
    assert times.of(18) == 7  # the last slope goes on
    assert StepTimes(((1, 0.5),)).of(9) == 0.5


def test_a_point_that_noise_has_raised_makes_no_row_free() -> None:
    times = StepTimes(((1, 1.0), (8, 9.0), (16, 9.5), (32, 20.0)))
    slopes = [times.of(rows + 1) - times.of(rows) for rows in range(1, 40)]
    assert slopes == pytest.approx(sorted(slopes))
    assert times.of(8) < 9
    assert times.of(32) == 20


def test_few_rows_that_took_long_make_no_more_rows_free() -> None:
    times = StepTimes(POINTS)
    for _ in range(100):
        times.observe(1, 3.0)  # as beside another process
        times.observe(8, 2.0)
    seconds = [times.of(rows) for rows in range(1, 20)]
    assert seconds == sorted(seconds)


def test_a_slower_machine_slows_all_alike() -> None:
    times = StepTimes(POINTS)
    for _ in range(100):
        times.observe(8, 6.0)
    assert times.of(8) == pytest.approx(6, rel=0.02)
    # The pace has followed sooner than the shape.
    assert times.of(16) / times.of(8) == pytest.approx(3, rel=0.3)
    assert times.of(1) / times.of(8) == pytest.approx(0.5, rel=0.3)


@given(seed=st.integers(0, 999))
def test_times_that_were_measured_wrong_come_right(seed: int) -> None:
    rng = random.Random(seed)
    truth = StepTimes(((1, 1.0), (4, 1.0), (8, 3.0), (16, 8.0)))
    times = StepTimes(POINTS)
    for _ in range(1000):
        rows = rng.randint(1, 16)
        times.observe(rows, truth.of(rows) * rng.uniform(0.9, 1.1))
    for rows in range(1, 17):
        assert times.of(rows) == pytest.approx(truth.of(rows), rel=0.2)


def test_a_step_that_was_held_up_says_little() -> None:
    times = StepTimes(POINTS)
    times.observe(8, 1000.0)
    assert times.of(8) < 2.6
    times.observe(8, 0.0)
    assert times.of(8) > 1.5


@given(
    steps=st.lists(st.tuples(st.integers(1, 500), st.floats(0, 1e6)), max_size=50),
    rows=st.integers(1, 1000),
)
def test_times_stay_times(steps: list[tuple[int, float]], rows: int) -> None:
    times = StepTimes(POINTS)
    for step in steps:
        times.observe(*step)
    assert all(times.of(number) > 0 for number in (1, 4, 8, 16))
    assert times.of(rows) <= times.of(rows + 1) < float("inf")
