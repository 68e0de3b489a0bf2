"""Who decides in a simulation: this server's policy, dLoRA's way, and hindsight."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.simulation.simulator import Job, Outcome, Simulator, Step
from dynamic_lora_server.modes.costs import StepCosts
from dynamic_lora_server.modes.policy import Load, Mode, ModePolicy
from dynamic_lora_server.recorder import Arrival

_ROUNDS = 3


class PolicyStrategy:
    """First come, first served; `ModePolicy` decides what is merged."""

    def __init__(self, costs: StepCosts, mode: Mode = Mode.AUTO) -> None:
        self._policy = ModePolicy(costs, mode)

    def select(self, jobs: Sequence[Job], max_running: int) -> Sequence[Job]:
        """The oldest."""
        return jobs[:max_running]

    def choose(self, load: Load, now: float, /) -> str | None:
        """What the policy says."""
        return self._policy.decide(load, now)


@dataclass(slots=True)
class _Phase:
    """One stay of dLoRA's scheduler in a state, and both batches that it had the choice of."""

    num_steps: int = 0
    num_merged_rows: int = 0
    num_fcfs_rows: int = 0
    num_virtual_switches: int = 0
    top: str | None = None

    def record(self, top: str | None, num_merged: int, num_fcfs: int) -> None:
        """Count a step; a change of the top adapter would have been a switch."""
        self.num_steps += 1
        self.num_merged_rows += num_merged
        self.num_fcfs_rows += num_fcfs
        self.num_virtual_switches += top != self.top
        self.top = top


class DrainAndMerge:
    """dLoRA's scheduler (Wu et al., OSDI 2024), as in its published code.

    Merged, only requests of the merged adapter run; the others leave the batch and
    keep their KV cache. Unmerged, all run, first come, first served. Of n requests
    that would run first come, first served, and m of one adapter: merge it when
    m >= right * n, stay while m >= left * n. `left` begins at the ratio of a merged
    step to an unmerged one; both thresholds are adapted after each phase, 0.05
    additively and 1.1 multiplicatively. Its credits against starvation need
    hundreds of thousands of overtakes at its defaults, and are left out.
    """

    def __init__(self, costs: StepCosts, *, max_running: int, num_adapters: int) -> None:
        self._merged_step_s = costs.step_s(max_running)
        self._unmerged_step_s = self._merged_step_s + costs.delta_s(max_running, num_adapters)
        self._switch_s = costs.switch_s
        self._left = self._merged_step_s / self._unmerged_step_s
        self._right = 1.0
        self._merged: str | None = None
        self._phase = _Phase()

    def select(self, jobs: Sequence[Job], max_running: int) -> Sequence[Job]:
        """The oldest of the merged adapter, or the oldest of all."""
        counts = Counter(job.adapter for job in jobs if job.adapter is not None)
        top = max(counts, key=counts.__getitem__, default=None)
        num_fcfs = min(len(jobs), max_running)
        wanted = self._wanted(counts, top, num_fcfs)
        if wanted != self._merged:
            self._end_phase(self._merged is not None)
            self._merged = wanted
        candidate = top if wanted is None else wanted
        num_merged = min(counts[candidate], max_running) if candidate is not None else 0
        self._phase.record(candidate, num_merged, num_fcfs)
        chosen = jobs if wanted is None else [job for job in jobs if job.adapter == wanted]
        return chosen[:max_running]

    def choose(self, _load: Load, _now: float, /) -> str | None:
        """What `select` has decided."""
        return self._merged

    def _wanted(self, counts: Counter[str], top: str | None, num_fcfs: int) -> str | None:
        merged = self._merged
        if merged is not None and counts[merged] and counts[merged] >= self._left * num_fcfs:
            return merged
        if top is not None and counts[top] >= self._right * num_fcfs:
            return top
        return None

    def _end_phase(self, was_merged: bool) -> None:
        """Compare what the phase did with what its alternative would have done."""
        phase, self._phase = self._phase, _Phase()
        if not phase.num_steps:
            return
        merged_s = self._merged_step_s * phase.num_steps + self._switch_s
        unmerged_s = self._unmerged_step_s * phase.num_steps
        if not was_merged:
            merged_s += self._switch_s * (phase.num_virtual_switches - 1)
            unmerged_s += self._switch_s
        advantage = phase.num_merged_rows / merged_s - phase.num_fcfs_rows / unmerged_s
        if was_merged:
            self._adapt_right(advantage)
        else:
            self._adapt_left(advantage)

    def _adapt_right(self, advantage: float) -> None:
        if advantage < 0:
            self._right *= 1.1
        elif advantage > 0 and self._right - 0.05 > self._left:
            self._right -= 0.05

    def _adapt_left(self, advantage: float) -> None:
        if advantage > 0:
            self._left /= 1.1
        elif advantage < 0 and self._left + 0.05 < self._right:
            self._left += 0.05


class _Replay:
    """Follows a plan made for given steps, step by step or at the same times."""

    def __init__(self, steps: Sequence[Step], plan: Sequence[str | None], *, by_time: bool) -> None:
        self._starts = [step.start_s for step in steps]
        self._plan = plan
        self._by_time = by_time
        self._index = -1

    def select(self, jobs: Sequence[Job], max_running: int) -> Sequence[Job]:
        """The oldest."""
        return jobs[:max_running]

    def choose(self, _load: Load, now: float, /) -> str | None:
        """The plan for this step; past the plan's end, its last."""
        last = len(self._plan) - 1
        if self._by_time:
            while self._index < last and self._starts[self._index + 1] <= now:
                self._index += 1
        else:
            self._index = min(self._index + 1, last)
        return self._plan[max(self._index, 0)]


def hindsight(simulator: Simulator, trace: Sequence[Arrival], costs: StepCosts) -> Outcome:
    """What could have been done, had the future been known.

    The steps of a run without merges are taken as given, and the cheapest sequence
    of merges for exactly these steps is found by dynamic programming. Following it
    changes the steps, as it gains time, so it is followed step by step and by the
    clock, and planned again for the steps that came, a few times over. The outcome
    with the least mean latency is returned. First come, first served throughout.
    """
    best = simulator.run(trace, PolicyStrategy(costs, Mode.BYPASS))
    adapters = sorted({arrival.adapter for arrival in trace if arrival.adapter is not None})
    for by_time in (False, True):
        outcome = best
        for _ in range(_ROUNDS):
            plan = cheapest_plan([step.rows for step in outcome.steps], adapters, costs)
            outcome = simulator.run(trace, _Replay(outcome.steps, plan, by_time=by_time))
            if sum(outcome.latencies_s) < sum(best.latencies_s):
                best = outcome
    return best


def cheapest_plan(
    steps: Sequence[dict[str | None, int]], adapters: Sequence[str], costs: StepCosts
) -> list[str | None]:
    """What to hold merged in each of these steps, so that steps and switches take least time.

    Exact (Viterbi's algorithm over the adapters and nothing); begins with nothing merged.
    """
    states: list[str | None] = [None, *adapters]
    totals = {state: 0.0 if state is None else costs.switch_s for state in states}
    origins: list[dict[str | None, str | None]] = []
    for rows in steps:
        cheapest = min(states, key=totals.__getitem__)
        limit = totals[cheapest] + costs.switch_s
        origin = {state: state if totals[state] <= limit else cheapest for state in states}
        totals = {s: min(totals[s], limit) + costs.batch_s(rows, s) for s in states}
        origins.append(origin)
    state = min(states, key=totals.__getitem__)
    plan = []
    for origin in reversed(origins):
        plan.append(state)
        state = origin[state]
    return plan[::-1]
