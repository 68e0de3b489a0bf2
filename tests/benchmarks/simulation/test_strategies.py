from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulation.simulator import Simulator
from benchmarks.simulation.strategies import (
    DrainAndMerge,
    PolicyStrategy,
    cheapest_plan,
    hindsight,
)
from benchmarks.simulation.traces import Shape, synthetic
from dynamic_lora_server.modes import Mode, StepCosts
from dynamic_lora_server.recorder import Arrival

COSTS = StepCosts(base=((1, 1.0),), deltas=((1, ((1, 0.8),)),), switch_s=2.0)
STATES = (None, "a", "b")
steps = st.lists(
    st.dictionaries(st.sampled_from(STATES), st.integers(1, 4), min_size=1), max_size=5
)


def cost(plan: tuple[str | None, ...], rows: list[dict[str | None, int]]) -> float:
    """Steps and switches of a plan that begins with nothing merged."""
    held = (None, *plan)[: len(plan)]
    switches = sum(before != after for before, after in zip(held, plan, strict=True))
    total = sum(COSTS.batch_s(step, merged) for step, merged in zip(rows, plan, strict=True))
    return total + switches * COSTS.switch_s


@given(rows=steps)
def test_the_plan_is_the_cheapest_of_all(rows: list[dict[str | None, int]]) -> None:
    plan = tuple(cheapest_plan(rows, ["a", "b"], COSTS))
    best = min(cost(other, rows) for other in product(STATES, repeat=len(rows)))
    assert len(plan) == len(rows)
    assert cost(plan, rows) == pytest.approx(best)


def test_hindsight_merges_at_the_very_first_step() -> None:
    trace = synthetic("single", Shape(rate=1.0, num_requests=40))
    simulator = Simulator(COSTS, num_clients=8)
    outcome = hindsight(simulator, trace, COSTS)
    assert outcome.num_switches == 1
    assert outcome.num_merged_tokens == outcome.num_tokens
    assert outcome.tokens_per_s > simulator.run(trace, PolicyStrategy(COSTS)).tokens_per_s


def requests(*adapters: str | None, output: int = 5) -> list[Arrival]:
    return [
        Arrival(arrival_s=0.0, adapter=adapter, num_prompt_tokens=1, num_output_tokens=output)
        for adapter in adapters
    ]


def drain(max_running: int = 4) -> DrainAndMerge:
    return DrainAndMerge(COSTS, max_running=max_running, num_adapters=2)


def test_drain_and_merge_runs_the_merged_adapter_alone() -> None:
    simulator = Simulator(COSTS, max_running=4)
    outcome = simulator.run(requests("a", "b", "a", "a", "a", "b"), drain())
    # Four requests of a fill a batch of four: b has to leave it.
    assert outcome.steps[0].rows == {"a": 4}
    assert [step.merged for step in outcome.steps] == ["a"] * 5 + ["b"] * 5
    assert outcome.num_differential_tokens == 0
    assert outcome.num_tokens == 30


def test_drain_and_merge_does_not_merge_an_even_batch() -> None:
    outcome = Simulator(COSTS, max_running=4).run(requests("a", "b", "a", "b", None), drain())
    assert outcome.steps[0].merged is None
    assert outcome.steps[0].rows == {"a": 2, "b": 2}


def test_drain_and_merge_stays_while_the_share_is_above_its_left_threshold() -> None:
    # Merged steps take 1 s, others 1.8 s: a stays merged above 0.56 of the batch.
    trace = [*requests("a", output=3), *requests("a", "a", "a"), *requests("b", "b")]
    outcome = Simulator(COSTS, max_running=4).run(trace, drain())
    assert [step.merged for step in outcome.steps[:5]] == ["a"] * 5


def test_always_bypass_holds_nothing() -> None:
    trace = synthetic("one-hot", Shape(rate=1.0, num_requests=30))
    outcome = Simulator(COSTS).run(trace, PolicyStrategy(COSTS, Mode.BYPASS))
    assert {step.merged for step in outcome.steps} == {None}
