import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamic_lora_server.modes.costs import Mix, Own, StepCosts, rising

COSTS = StepCosts(
    base=((1, 0.05), (8, 0.09), (32, 0.18)),
    deltas=((1, ((1, 0.006), (32, 0.010))), (8, ((8, 0.020), (32, 0.044)))),
    switch_s=0.15,
)


def test_measured_points_are_met_and_joined_by_lines() -> None:
    assert COSTS.step_s(8) == pytest.approx(0.09)
    assert COSTS.step_s(20) == pytest.approx(0.135)
    assert COSTS.delta_s(32, 1) == pytest.approx(0.010)
    assert COSTS.delta_s(20, 8) == pytest.approx(0.032)


def test_between_two_numbers_of_adapters_costs_lie_between() -> None:
    assert COSTS.delta_s(32, 4) == pytest.approx(0.010 + 3 / 7 * 0.034)


def test_past_the_last_point_the_last_slope_goes_on() -> None:
    assert COSTS.step_s(56) == pytest.approx(0.27)
    assert COSTS.delta_s(44, 8) == pytest.approx(0.056)


def test_more_adapters_than_were_measured_count_as_the_most_that_were() -> None:
    assert COSTS.delta_s(32, 15) == COSTS.delta_s(32, 8)


def test_nothing_costs_nothing() -> None:
    assert COSTS.step_s(0) == COSTS.delta_s(0, 3) == COSTS.delta_s(5, 0) == 0


def test_one_point_is_a_constant() -> None:
    costs = StepCosts(base=((4, 0.1),), deltas=((1, ((4, 0.01),)),), switch_s=1)
    assert costs.step_s(1) == costs.step_s(100) == 0.1
    assert costs.delta_s(100, 9) == 0.01


def test_bypass_pays_for_all_adapters_and_nothing_for_base_rows() -> None:
    rows = {"a": 5, "b": 3, None: 24}
    expected = COSTS.step_s(32) + COSTS.delta_s(8, 2)
    assert COSTS.batch_s(rows, None) == pytest.approx(expected)


def test_rows_of_the_merged_adapter_are_free() -> None:
    assert COSTS.batch_s({"a": 8}, "a") == pytest.approx(COSTS.step_s(8))


def test_other_rows_pay_their_own_delta_and_that_of_the_merged_one() -> None:
    rows = {"a": 20, "b": 8, None: 4}
    expected = COSTS.step_s(32) + COSTS.delta_s(8, 1) + COSTS.delta_s(12, 1)
    assert COSTS.batch_s(rows, "a") == pytest.approx(expected)


def test_a_merged_adapter_without_rows_burdens_all_others() -> None:
    expected = COSTS.step_s(4) + COSTS.delta_s(4, 1)
    assert COSTS.batch_s({None: 4}, "a") == pytest.approx(expected)


@given(rows=st.integers(1, 600), own=st.integers(0, 599), adapters=st.integers(1, 40))
def test_more_rows_of_the_merged_adapter_never_cost_more(
    rows: int, own: int, adapters: int
) -> None:
    own = min(own, rows - 1)
    adapters = min(adapters, rows)
    mix = Mix(rows, rows, adapters)
    assert COSTS.overhead_s(mix, Own(own + 1)) <= COSTS.overhead_s(mix, Own(own)) + 1e-12


def test_an_adapter_of_four_times_the_size_costs_as_much_as_four() -> None:
    assert COSTS.overhead_s(Mix(8, 32, 4), None) == COSTS.delta_s(32, 4)
    assert COSTS.overhead_s(Mix(8, 32, 4), Own(8, 4.0)) == 0
    assert COSTS.overhead_s(Mix(8, 16, 4), Own(4, 4.0)) == COSTS.delta_s(16, 4)


@given(rows=st.integers(1, 600), size=st.floats(0.01, 1))
def test_two_adapters_of_half_the_size_cost_at_most_their_tables_more(
    rows: int, size: float
) -> None:
    """The arithmetic is the same: rows are counted by size once, not twice."""
    whole, halves = COSTS.delta_s(rows * size, size), 2 * COSTS.delta_s(rows * size / 2, size / 2)
    assert abs(halves - whole) <= 2 * COSTS.delta_s(1, 1)


def test_an_adapter_of_no_size_costs_nothing() -> None:
    assert COSTS.delta_s(32 * 0.01, 0.01) == pytest.approx(0.01 * 0.006)
    assert COSTS.delta_s(1e-15, 1e-17) == pytest.approx(0)
    mix = Mix(num_rows=32, delta_rows=31.01, size=1.01)
    assert COSTS.overhead_s(mix, None) == pytest.approx(COSTS.delta_s(31, 1), rel=0.01)
    assert COSTS.overhead_s(mix, Own(1, 0.01)) == pytest.approx(COSTS.delta_s(31, 1), rel=0.01)


@given(seconds=st.lists(st.floats(0, 10), min_size=1, max_size=6), switch_s=st.floats(0, 100))
def test_json_round_trip(seconds: list[float], switch_s: float) -> None:
    points = rising(tuple(enumerate(seconds, start=1)))
    costs = StepCosts(base=points, deltas=((1, points), (4, points)), switch_s=switch_s)
    assert StepCosts.from_json(costs.to_json()) == costs


def test_a_switch_that_is_impossible_survives_json() -> None:
    never = replace(COSTS, switch_s=math.inf)
    assert '"switch_s": null' in never.to_json()
    assert StepCosts.from_json(never.to_json()) == never


def test_rising_takes_dips_away() -> None:
    assert rising(((1, 0.2), (4, 0.1), (8, 0.3))) == ((1, 0.2), (4, 0.2), (8, 0.3))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"base": ()}, "base: expected points by ascending rows"),
        ({"base": ((8, 0.1), (1, 0.05))}, "base: expected points by ascending rows"),
        ({"base": ((0, 0.1),)}, "from 1 on"),
        ({"base": ((1, math.nan),)}, "base: seconds must be finite"),
        ({"base": ((1, -0.1),)}, "at least 0"),
        ({"base": ((1, 0.2), (2, 0.1))}, "base: seconds must not fall"),
        ({"deltas": ()}, "deltas: expected ascending adapter counts from 1"),
        ({"deltas": ((2, ((1, 0.1),)),)}, "adapter counts from 1, got [2]"),
        ({"deltas": ((1, ()),)}, "deltas of 1: expected points"),
        ({"switch_s": -1.0}, "switch_s must be at least 0, got -1.0"),
        ({"switch_s": math.nan}, "switch_s must be at least 0"),
    ],
)
def test_unusable_points_are_refused(change: dict[str, object], text: str) -> None:
    fields = {"base": COSTS.base, "deltas": COSTS.deltas, "switch_s": 1.0} | change
    with pytest.raises(ValueError) as raised:
        StepCosts(**fields)  # type: ignore[arg-type]
    assert text in str(raised.value)


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"base": 3, "deltas": [], "switch_s": 1}', "not JSON", "null",
     '{"base": [[1, 0.1]], "deltas": [[1, [[1, 0.1]]]], "switch_s": 1, "extra": 2}'],
)  # fmt: skip
def test_other_documents_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        StepCosts.from_json(text)
