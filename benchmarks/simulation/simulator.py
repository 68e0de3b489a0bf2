"""The step loop without a model: who runs, how long it takes, when it is done."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dynamic_lora_server.modes.costs import StepCosts
from dynamic_lora_server.modes.policy import Load
from dynamic_lora_server.recorder import Arrival

Rows = dict[str | None, int]
"""Token rows of one step by adapter; None is the base model."""


@dataclass(slots=True, eq=False)
class Job:
    """One request under way."""

    arrival: Arrival
    arrived_s: float
    num_prefilled: int = 0
    num_generated: int = 0

    @property
    def adapter(self) -> str | None:
        return self.arrival.adapter

    @property
    def decoding(self) -> bool:
        """Whether its prompt has been run."""
        return self.num_prefilled == self.arrival.num_prompt_tokens

    @property
    def finished(self) -> bool:
        return self.num_generated == self.arrival.num_output_tokens


class Strategy(Protocol):
    """Decides who runs and what is merged. One object serves one simulation."""

    def select(self, jobs: Sequence[Job], max_running: int) -> Sequence[Job]:
        """Who runs in the next step, at most `max_running` of `jobs`, which came in this order."""
        ...

    def choose(self, load: Load, now: float, /) -> str | None:
        """What is to be merged in the next step; a switch takes place at once."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a simulation: when it began, its rows, and what was merged."""

    start_s: float
    rows: Rows
    merged: str | None


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a strategy made of a trace. Tokens are generated ones; times are seconds."""

    steps: list[Step] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    num_switches: int = 0
    num_tokens: int = 0
    num_merged_tokens: int = 0
    num_differential_tokens: int = 0
    end_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over the time from the first arrival to the last answer."""
        return self.num_tokens / (self.end_s - self.steps[0].start_s)


class Simulator:
    """Continuous batching with chunked prefill, as the engine's scheduler does it.

    A step runs one token of every decoding request that was selected and fills up
    to `max_step_tokens` with pieces of their prompts, first come, first served. Neither KV memory
    is modelled, nor that the scheduler counts the prompts' tokens alone and lets short
    prompts pass long ones.

    With `num_clients`, the loop is closed: that many clients take the trace's requests
    in their order, each its next when it has its answer; arrival times do not matter.
    """

    def __init__(
        self,
        costs: StepCosts,
        *,
        max_running: int = 32,
        max_step_tokens: int = 512,
        num_clients: int | None = None,
    ) -> None:
        self._num_clients = num_clients
        self._costs = costs
        self._max_running = max_running
        self._max_step_tokens = max(max_step_tokens, max_running + 1)

    def run(self, trace: Sequence[Arrival], strategy: Strategy) -> Outcome:
        """Serve a trace, sorted by arrival, to its end. Raises ValueError if it is empty."""
        if not trace:
            raise ValueError("the trace holds no request")
        run = _Run(trace)
        while run.jobs or run.pending:
            run.admit(self._num_clients)
            self._step(run, strategy)
        run.outcome.end_s = run.now
        return run.outcome

    def _step(self, run: "_Run", strategy: Strategy) -> None:
        selected = strategy.select(run.jobs, self._max_running)
        pieces = self._pieces(selected)
        load = _load(run, pieces)
        merged = strategy.choose(load, run.now)
        if merged != run.merged:
            run.now += self._costs.switch_s
            run.merged = merged
            run.outcome.num_switches += 1
        step = Step(start_s=run.now, rows=dict(load.rows), merged=merged)
        run.outcome.steps.append(step)
        run.now += self._costs.batch_s(step.rows, merged)
        run.advance(pieces)

    def _pieces(self, selected: Sequence[Job]) -> list[tuple[Job, int]]:
        pieces = [(job, 1) for job in selected if job.decoding]
        budget = self._max_step_tokens - len(pieces)
        for job in selected:
            number = min(budget, job.arrival.num_prompt_tokens - job.num_prefilled)
            if number > 0:
                pieces.append((job, number))
                budget -= number
        return pieces


class _Run:
    """The state of one simulation."""

    def __init__(self, trace: Sequence[Arrival]) -> None:
        self.pending = list(reversed(trace))
        self.jobs: list[Job] = []
        self.now = 0.0
        self.merged: str | None = None
        self.outcome = Outcome()

    def admit(self, num_clients: int | None) -> None:
        """Let in who has come by now, or wait for the next where nobody is there."""
        if num_clients is not None:
            while self.pending and len(self.jobs) < num_clients:
                self.jobs.append(Job(self.pending.pop(), self.now))
            return
        if not self.jobs:
            self.now = max(self.now, self.pending[-1].arrival_s)
        while self.pending and self.pending[-1].arrival_s <= self.now:
            arrival = self.pending.pop()
            self.jobs.append(Job(arrival, arrival.arrival_s))

    def advance(self, pieces: Sequence[tuple[Job, int]]) -> None:
        """Record that the pieces have run; end the requests whose last token came."""
        for job, number in pieces:
            if not job.decoding:
                job.num_prefilled += number
            if job.decoding:
                job.num_generated += 1
                self._count(job)
            if job.finished:
                self.outcome.latencies_s.append(self.now - job.arrived_s)
        self.jobs = [job for job in self.jobs if not job.finished]

    def _count(self, job: Job) -> None:
        self.outcome.num_tokens += 1
        if self.merged is None:
            return
        if job.adapter == self.merged:
            self.outcome.num_merged_tokens += 1
        else:
            self.outcome.num_differential_tokens += 1


def _load(run: _Run, pieces: Sequence[tuple[Job, int]]) -> Load:
    rows: Rows = {}
    for job, number in pieces:
        rows[job.adapter] = rows.get(job.adapter, 0) + number
    requests: Rows = {}
    for job in run.jobs:
        requests[job.adapter] = requests.get(job.adapter, 0) + 1
    return Load(merged=run.merged, rows=rows, requests=requests)
