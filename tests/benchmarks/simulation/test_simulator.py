from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulation.simulator import Job, Simulator
from benchmarks.simulation.strategies import PolicyStrategy
from dynamic_lora_server.modes import Load, Mode, StepCosts
from dynamic_lora_server.recorder import Arrival

# A step takes 1 s and 1 s more for deltas; a switch takes 10 s.
COSTS = StepCosts(base=((1, 1.0),), deltas=((1, ((1, 1.0),)),), switch_s=10.0)


def arrival(at: float, adapter: str | None = "a", prompt: int = 2, output: int = 3) -> Arrival:
    return Arrival(
        arrival_s=at, adapter=adapter, num_prompt_tokens=prompt, num_output_tokens=output
    )


class Always:
    """Keeps one adapter merged from the first step on."""

    def __init__(self, merged: str | None) -> None:
        self.merged = merged
        self.loads: list[Load] = []

    def select(self, jobs: Sequence[Job], max_running: int) -> Sequence[Job]:
        return jobs[:max_running]

    def choose(self, load: Load, _now: float, /) -> str | None:
        self.loads.append(load)
        return self.merged


def test_one_request_by_hand() -> None:
    outcome = Simulator(COSTS).run([arrival(5.0)], Always(None))
    # The prompt's step gives the first token; each step costs base and delta.
    assert [step.rows for step in outcome.steps] == [{"a": 2}, {"a": 1}, {"a": 1}]
    assert outcome.latencies_s == [6.0]
    assert outcome.tokens_per_s == 3 / 6
    assert (outcome.num_tokens, outcome.num_merged_tokens, outcome.num_switches) == (3, 0, 0)


def test_a_merge_takes_its_time_and_frees_the_steps() -> None:
    outcome = Simulator(COSTS).run([arrival(0.0)], Always("a"))
    assert outcome.latencies_s == [10.0 + 3 * 1.0]
    assert (outcome.num_merged_tokens, outcome.num_switches) == (3, 1)


def test_other_rows_are_served_by_the_difference() -> None:
    outcome = Simulator(COSTS).run([arrival(0.0, "b", output=1)], Always("a"))
    assert outcome.latencies_s == [10.0 + 3.0]
    assert outcome.num_differential_tokens == 1


def test_long_prompts_are_cut_beside_decoding() -> None:
    trace = [arrival(0.0, "a", 2, 4), arrival(0.0, "b", 20, 1)]
    simulator = Simulator(COSTS, max_running=4, max_step_tokens=8)
    outcome = simulator.run(trace, Always(None))
    rows = [step.rows for step in outcome.steps]
    assert rows == [{"a": 2, "b": 6}, {"a": 1, "b": 7}, {"a": 1, "b": 7}, {"a": 1}]


def test_no_more_run_than_may_and_the_load_counts_those_who_wait() -> None:
    strategy = Always(None)
    trace = [arrival(0.0, "a"), arrival(0.0, "a"), arrival(0.0, "b"), arrival(0.0, None)]
    Simulator(COSTS, max_running=2).run(trace, strategy)
    assert strategy.loads[0].rows == {"a": 4}
    assert strategy.loads[0].requests == {"a": 2, "b": 1, None: 1}


def test_idle_time_passes() -> None:
    outcome = Simulator(COSTS).run([arrival(0.0), arrival(100.0)], Always(None))
    assert outcome.latencies_s == [6.0, 6.0]
    assert outcome.end_s == 106.0


def test_a_closed_loop_ignores_arrival_times() -> None:
    trace = [arrival(1000.0 * number, output=1) for number in range(4)]
    outcome = Simulator(COSTS, num_clients=2).run(trace, Always(None))
    assert outcome.latencies_s == [2.0] * 4
    assert outcome.end_s == 4.0


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(ValueError, match="the trace holds no request"):
        Simulator(COSTS).run([], Always(None))


arrivals = st.builds(
    arrival,
    st.floats(0, 50),
    st.sampled_from(("a", "b", "c", None)),
    st.integers(1, 30),
    st.integers(1, 12),
)


@given(trace=st.lists(arrivals, min_size=1, max_size=20), clients=st.sampled_from((None, 1, 5)))
def test_every_token_is_run_exactly_once(trace: list[Arrival], clients: int | None) -> None:
    trace.sort(key=lambda item: item.arrival_s)
    simulator = Simulator(COSTS, max_running=3, max_step_tokens=8, num_clients=clients)
    outcome = simulator.run(trace, PolicyStrategy(COSTS, Mode.AUTO))
    assert len(outcome.latencies_s) == len(trace)
    assert outcome.num_tokens == sum(item.num_output_tokens for item in trace)
    num_rows = sum(sum(step.rows.values()) for step in outcome.steps)
    prompts = sum(item.num_prompt_tokens for item in trace)
    assert num_rows == prompts + outcome.num_tokens - len(trace)
    assert all(sum(step.rows.values()) <= 8 for step in outcome.steps)
    busy = sum(COSTS.batch_s(step.rows, step.merged) for step in outcome.steps)
    assert outcome.end_s >= busy + outcome.num_switches * COSTS.switch_s - 1e-6
