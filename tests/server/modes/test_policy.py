import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamic_lora_server.modes import Load, Mode, ModePolicy, StepCosts, rising
from dynamic_lora_server.modes.costs import Mix, Own
from dynamic_lora_server.modes.policy import MAX_TRACKED

CPU = StepCosts(
    base=((1, 0.050), (32, 0.180), (512, 1.1)),
    deltas=(
        (1, ((1, 0.006), (8, 0.008), (32, 0.010), (512, 0.060))),
        (8, ((8, 0.020), (32, 0.045), (512, 0.090))),
    ),
    switch_s=0.15,
)
NAMES = ("a", "b", "c", "d")
Rows = dict[str | None, int]

rows_of_a_step = st.dictionaries(
    st.sampled_from((None, *NAMES)), st.integers(1, 64), min_size=1, max_size=5
)


@st.composite
def step_costs(draw: st.DrawFn) -> StepCosts:
    """Costs with any rising points."""

    def points() -> tuple[tuple[int, float], ...]:
        seconds = draw(st.lists(st.floats(0, 0.1), min_size=3, max_size=3))
        return rising(tuple(zip((1, 8, 64), seconds, strict=True)))

    deltas = ((1, points()), (4, points()))
    return StepCosts(base=points(), deltas=deltas, switch_s=draw(st.floats(0.001, 1)))


class Engine:
    """Carries out what a policy decides, as the engine would."""

    def __init__(self, policy: ModePolicy, merged: str | None = None) -> None:
        self.policy = policy
        self.merged = merged
        self.num_switches = 0
        self.now = 0.0

    def step(
        self,
        rows: Rows,
        requests: Rows | None = None,
        seconds: float = 0.2,
        sizes: dict[str, float] | None = None,
    ) -> str | None:
        """One step of these rows; what was merged in it."""
        self.now += seconds
        requests = dict.fromkeys(rows, 1) if requests is None else requests
        load = Load(merged=self.merged, rows=rows, requests=requests, sizes=sizes or {})
        chosen = self.policy.decide(load, self.now)
        self.num_switches += chosen != self.merged
        self.merged = chosen
        return chosen

    def until(self, wanted: str | None, rows: Rows, limit: int = 1000) -> int:
        """How many steps of these rows it takes until `wanted` is merged."""
        for number in range(1, limit + 1):
            if self.step(rows) == wanted:
                return number
        raise AssertionError(f"{wanted} was not merged in {limit} steps")


def test_the_only_adapter_is_merged_once_bypass_has_cost_a_switch() -> None:
    engine = Engine(ModePolicy(CPU))
    # 32 rows cost 10 ms of 180 a step in bypass, of which 3.6 do not count; a switch costs 150.
    assert engine.until("a", {"a": 32}) == 24
    for _ in range(500):
        assert engine.step({"a": 32}) == "a"


def test_a_larger_adapter_is_merged_sooner_and_a_small_one_never() -> None:
    def first_merge(size: float) -> int | None:
        engine = Engine(ModePolicy(CPU))
        steps = (number for number in range(300) if engine.step({"a": 32}, sizes={"a": size}))
        return next(steps, None)

    assert first_merge(1.0) == 23
    assert (first_merge(4.0) or 99) < 5
    assert first_merge(0.2) is None


def test_of_two_the_one_that_spares_more_is_merged() -> None:
    engine = Engine(ModePolicy(CPU))
    for _ in range(100):
        engine.step({"a": 17, "b": 15}, sizes={"a": 0.05, "b": 8.0})
    assert engine.merged is None  # "b" would burden as many rows as it spares
    for _ in range(100):
        engine.step({"a": 7, "b": 25}, sizes={"a": 0.05, "b": 8.0})
    assert engine.merged == "b"


def test_an_even_mix_is_left_alone() -> None:
    engine = Engine(ModePolicy(CPU))
    rows: Rows = dict.fromkeys("abcdefgh", 4)
    for _ in range(500):
        assert engine.step(rows) is None


def test_base_rows_alone_are_unmerged_for() -> None:
    engine = Engine(ModePolicy(CPU), merged="a")
    assert engine.until(None, {None: 32}) == 15


def test_a_new_hot_adapter_is_swapped_in() -> None:
    engine = Engine(ModePolicy(replace(CPU, base=((1, 0.02), (512, 0.02)))))
    engine.until("a", {"a": 30, "b": 2})
    assert 15 < engine.until("b", {"a": 2, "b": 30}) < 30
    assert engine.num_switches == 2


def test_what_is_merged_stays_while_nobody_asks() -> None:
    engine = Engine(ModePolicy(CPU), merged="a")
    assert engine.step({}) == "a"


def test_a_merge_that_did_not_pay_makes_the_next_one_harder() -> None:
    policy = ModePolicy(CPU)
    engine = Engine(policy)
    first = engine.until("a", {"a": 32})
    engine.until(None, {None: 32})
    assert policy.caution == 2
    assert 2 * first - 1 <= engine.until("a", {"a": 32}) <= 2 * first


def test_what_saves_less_than_costs_are_measured_to_is_left_alone() -> None:
    slow = replace(CPU, base=((1, 0.5), (512, 0.5)))  # 2% of a step are the delta's 10 ms
    engine = Engine(ModePolicy(slow))
    for _ in range(500):
        assert engine.step({"a": 32}) is None


def test_a_merge_that_paid_and_time_bring_trust_back() -> None:
    policy = ModePolicy(CPU)
    engine = Engine(policy)
    for _ in range(2):
        engine.until("a", {"a": 32})
        engine.until(None, {None: 32})
    assert policy.caution == 4
    engine.until("a", {"a": 32})
    for _ in range(100):
        engine.step({"a": 32}, seconds=0)
    engine.until(None, {None: 32})
    assert policy.caution <= 2
    engine.step({None: 1}, seconds=200 * CPU.switch_s)
    assert policy.caution == 1


def test_unmerging_needs_no_trust() -> None:
    engine = Engine(ModePolicy(CPU))
    for _ in range(4):
        engine.until("a", {"a": 32})
        assert engine.until(None, {None: 32}) == 15


FLAT = StepCosts(base=((1, 0.015),), deltas=((1, ((1, 0.012),)),), switch_s=0.02)


@pytest.mark.parametrize("costs", [CPU, FLAT, replace(CPU, switch_s=0.01)])
def test_a_load_that_turns_whenever_the_policy_does_costs_little(costs: StepCosts) -> None:
    """The worst case: the mix changes as soon as the policy has followed it."""
    engine = Engine(ModePolicy(costs))
    spent = bypass = 0.0
    for _ in range(4000):
        rows: Rows = {"a": 32} if engine.merged is None else {None: 32}
        before = engine.num_switches
        merged = engine.step(rows, seconds=costs.batch_s(rows, engine.merged))
        spent += costs.batch_s(rows, merged) + costs.switch_s * (engine.num_switches - before)
        bypass += costs.batch_s(rows, None)
    assert engine.num_switches > 4
    assert bypass / spent > 0.97


def test_adapters_that_cannot_be_merged_are_passed_over() -> None:
    engine = Engine(ModePolicy(CPU, can_merge=lambda name: name != "a"))
    for _ in range(300):
        assert engine.step({"a": 32}) is None
    engine = Engine(ModePolicy(CPU, Mode.MERGED, can_merge=lambda name: name != "a"))
    assert engine.step({"a": 5, "b": 1}, requests={"a": 5, "b": 1}) == "b"


def test_one_that_may_not_be_merged_any_more_is_not_though_it_would_pay() -> None:
    barred: set[str] = set()
    engine = Engine(ModePolicy(CPU, can_merge=lambda name: name not in barred))
    for _ in range(20):
        assert engine.step({"a": 32}) is None
    barred.add("a")  # deleted, with requests that still run
    for _ in range(100):
        assert engine.step({"a": 32}) is None
    barred.clear()
    assert engine.step({"a": 32}) == "a"


def test_merged_mode_takes_the_most_used_adapter_at_once() -> None:
    engine = Engine(ModePolicy(CPU, Mode.MERGED))
    assert engine.step({"a": 1, "b": 60}, requests={"a": 3, "b": 2, None: 9}) == "a"
    assert engine.step({"b": 60}, requests={"a": 3, "b": 3}) == "a"
    assert engine.step({"b": 60}, requests={"a": 3, "b": 4}) == "b"
    assert engine.step({None: 1}, requests={None: 1}) == "b"


def test_a_switch_made_elsewhere_starts_the_balances_anew() -> None:
    engine = Engine(ModePolicy(CPU))
    for _ in range(14):
        engine.step({"a": 32})
    engine.merged = "b"
    assert engine.step({"a": 32}) == "b"


@given(loads=st.lists(rows_of_a_step, max_size=60), costs=step_costs())
def test_bypass_mode_never_merges(loads: list[Rows], costs: StepCosts) -> None:
    engine = Engine(ModePolicy(costs, Mode.BYPASS))
    assert all(engine.step(rows) is None for rows in loads)


@given(
    loads=st.lists(rows_of_a_step, max_size=60),
    costs=step_costs(),
    merged=st.sampled_from((None, *NAMES)),
)
def test_an_endless_switch_is_never_made(
    loads: list[Rows], costs: StepCosts, merged: str | None
) -> None:
    engine = Engine(ModePolicy(replace(costs, switch_s=math.inf)), merged)
    assert all(engine.step(rows) == merged for rows in loads)


@given(
    loads=st.lists(st.tuples(rows_of_a_step, st.integers(1, 40)), max_size=20),
    costs=step_costs(),
    mode=st.sampled_from((Mode.AUTO, Mode.MERGED)),
)
def test_only_adapters_in_demand_are_merged(
    loads: list[tuple[Rows, int]], costs: StepCosts, mode: Mode
) -> None:
    engine = Engine(ModePolicy(costs, mode))
    for rows, number in loads:
        for _ in range(number):
            before = engine.merged
            chosen = engine.step(rows)
            assert chosen in {before, None, *rows}


@given(rows=rows_of_a_step, costs=step_costs(), merged=st.sampled_from((None, *NAMES)))
def test_a_constant_load_is_switched_for_at_most_once(
    rows: Rows, costs: StepCosts, merged: str | None
) -> None:
    engine = Engine(ModePolicy(costs), merged)
    for _ in range(300):
        engine.step(rows)
    assert engine.num_switches <= 1


@given(loads=st.lists(st.tuples(rows_of_a_step, st.integers(1, 40)), max_size=20))
def test_the_same_loads_give_the_same_decisions(loads: list[tuple[Rows, int]]) -> None:
    first, second = Engine(ModePolicy(CPU)), Engine(ModePolicy(CPU))
    for rows, number in loads:
        for _ in range(number):
            assert first.step(rows) == second.step(dict(rows))


@pytest.mark.parametrize("num_adapters", [64, 1024])
def test_a_decision_weighs_few_adapters_however_many_there_are(
    num_adapters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Own | None] = []
    overhead_s = StepCosts.overhead_s

    def counting(self: StepCosts, mix: Mix, own: Own | None) -> float:
        asked.append(own)
        return overhead_s(self, mix, own)

    monkeypatch.setattr(StepCosts, "overhead_s", counting)
    engine = Engine(ModePolicy(CPU))
    for step in range(30):  # others have most rows in each, or are the largest
        names = [f"{(index + step) % num_adapters:04d}" for index in range(num_adapters)]
        rows: Rows = {name: index + step + 1 for index, name in enumerate(names)}
        asked.clear()
        engine.step(rows, sizes={name: 1.0 / rows[name] ** 2 for name in names})
        # Bypass, what is merged, those with a balance, and the two tops.
        assert 0 < len(asked) <= 2 + MAX_TRACKED + 2


def test_modes_are_written_as_on_the_command_line() -> None:
    assert [str(mode) for mode in Mode] == ["auto", "bypass", "merged"]
    with pytest.raises(ValueError):
        Mode("fast")
