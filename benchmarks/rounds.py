"""A comparison in rounds: the peers take turns on each workload, one awake at a time."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Protocol

import psutil

from benchmarks.bar import OURS
from benchmarks.cells import Cell, LimitCell
from benchmarks.errors import BenchmarkError, InvalidWorkload, PeerUnavailable
from benchmarks.limit_rate import Limit
from benchmarks.neighbours import busy
from benchmarks.peers import PEERS, DynamicLora, Peer, Session, Setup
from benchmarks.report import Report
from benchmarks.workload import PromptMaker, Workload

# After the first round a peer has seen the shapes of the workload, and is warm.
_LATER_WARM_UP = 8
# Bytes that are free before a peer starts. vLLM alone takes so many, and all peers stay in memory:
# where it runs out, the system ends one of them, or rereads what it has dropped beside each cell.
_ROOM = 5 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A peer, and the numbers of clients that it is measured with; None is all."""

    peer: Peer
    clients: frozenset[int] | None = None

    @classmethod
    def parse(cls, text: str) -> "Choice":
        """Read `NAME` or `NAME@1+32`. Raises InvalidWorkload."""
        name, at, clients = text.partition("@")
        if name not in PEERS:
            raise InvalidWorkload(f"{name!r}: expected one of {', '.join(PEERS)}")
        try:
            wanted = frozenset(int(number) for number in clients.split("+")) if at else None
        except ValueError:
            raise InvalidWorkload(
                f"{text!r}: expected numbers of clients, as {name}@1+32"
            ) from None
        return cls(peer=PEERS[name], clients=wanted)

    @classmethod
    def variant(cls, text: str) -> "Choice":
        """Read `NAME=FLAGS`: this server with further options of `serve`.

        Raises InvalidWorkload.
        """
        name, _, flags = text.partition("=")
        if not name or not flags.startswith("--"):
            raise InvalidWorkload(f"{text!r}: expected NAME=FLAGS, as 'int8=--quantize int8'")
        return cls(peer=DynamicLora(name=f"{OURS}-{name}", flags=tuple(flags.split())))


class Gauge(Protocol):
    """The machine's clock (see `clock.Clock`)."""

    def read(self) -> float: ...


class LimitGauge(Protocol):
    """The machine's limit (see `limit.MachineLimit`)."""

    def measure(
        self, num_clients: int, num_prompt_tokens: int, num_output_tokens: int
    ) -> Limit: ...


@dataclass(slots=True, kw_only=True)
class Rounds:
    """One comparison under way.

    `save` is called after every cell. A cell that the report has from an earlier run is not
    measured again, one that failed is. Peers other than this server are measured with one sole
    adapter only where `sole_at` says so; `busy` other processes compute beside each cell.
    """

    setup: Setup
    workloads: Sequence[Workload]
    num_rounds: int
    prompts: PromptMaker
    report: Report
    clock: Gauge | None
    limit: LimitGauge | None
    save: Callable[[], None]
    say: Callable[[str], None]
    sole_at: frozenset[int] = frozenset({1})
    busy: int = 0
    _warm: set[tuple[str, Workload]] = field(default_factory=set)

    def run(self, choices: Sequence[Choice]) -> None:
        """Start every peer, then measure; a peer that cannot start is left out and named."""
        with ExitStack() as stack:
            sessions: dict[str, Session] = {}
            for choice in choices:
                if self._is_done(choice):
                    continue
                name = choice.peer.name
                self.say(f"{name}: starting")
                try:
                    if sessions:
                        _check_room()
                    sessions[name] = stack.enter_context(choice.peer.session(self.setup))
                except PeerUnavailable as reason:
                    self.report.left_out[name] = str(reason)
                    self.say(f"{name}: left out: {reason}")
                    continue
                self.report.left_out.pop(name, None)
                self.report.versions[name] = sessions[name].version
                self.report.weights[name] = sessions[name].weights
            started = [choice for choice in choices if choice.peer.name in sessions]
            for number in range(self.num_rounds):
                self._round(number, started, sessions)

    def _round(self, number: int, choices: Sequence[Choice], sessions: dict[str, Session]) -> None:
        for num_clients in dict.fromkeys(workload.num_clients for workload in self.workloads):
            cells = [w for w in self.workloads if w.num_clients == num_clients]
            self._measure_limit(number, cells[0])
            # Every second round the other way about: a machine that only gets slower, or
            # faster, then favours nobody.
            for choice in choices if number % 2 == 0 else reversed(choices):
                for workload in self._wanted(choice, cells):
                    if self._cell(number, choice.peer.name, workload) is None:
                        self._measure(number, choice.peer.name, sessions, workload)

    def _measure_limit(self, number: int, workload: Workload) -> None:
        clients = workload.num_clients
        known = any(
            c.round == number and c.limit.num_clients == clients for c in self.report.limits
        )
        if self.limit is None or known:
            return
        found = self.limit.measure(clients, workload.num_prompt_tokens, workload.num_output_tokens)
        self.report.limits.append(LimitCell(round=number, limit=found))
        self.say(f"round {number + 1}: machine limit, {clients} clients: {found.tokens_per_s:.1f}")
        self.save()

    def _measure(
        self, number: int, name: str, sessions: dict[str, Session], workload: Workload
    ) -> None:
        where = f"{workload.popularity}, {workload.num_clients} clients"
        self.say(f"round {number + 1} of {self.num_rounds}: {name}: {where}")
        num_warm_up = _LATER_WARM_UP if (name, workload) in self._warm else None
        began = time.perf_counter()
        before = None if self.clock is None else self.clock.read()
        with sessions[name].awake(), busy(self.busy):
            cell = measure_cell(
                name, sessions[name], workload, self.prompts, number=number, num_warm_up=num_warm_up
            )
        after = None if self.clock is None else self.clock.read()
        clocks = None if before is None or after is None else (before, after)
        self._warm.add((name, workload))
        self.report.cells = [
            *(c for c in self.report.cells if not _same(c, number, name, workload)),
            Cell(
                peer=name,
                workload=workload,
                summary=cell.summary,
                error=cell.error,
                round=number,
                clocks=clocks,
            ),
        ]
        self.save()
        self.say(f"  {outcome(cell)} ({time.perf_counter() - began:.0f} s)")

    def _cell(self, number: int, name: str, workload: Workload) -> Cell | None:
        """What an earlier run measured of this cell."""
        found = (c for c in self.report.cells if _same(c, number, name, workload))
        return next((c for c in found if c.summary is not None), None)

    def _wanted(self, choice: Choice, workloads: Sequence[Workload]) -> Iterator[Workload]:
        ours = choice.peer.name.startswith(OURS)
        for workload in workloads:
            clients = workload.num_clients
            if choice.clients is not None and clients not in choice.clients:
                continue
            if workload.popularity.kind != "base" and not choice.peer.has_adapters:
                continue
            if workload.popularity.kind != "one" or ours or clients in self.sole_at:
                yield workload

    def _is_done(self, choice: Choice) -> bool:
        cells = list(self._wanted(choice, self.workloads))
        name = choice.peer.name
        return all(
            self._cell(number, name, workload) is not None
            for number in range(self.num_rounds)
            for workload in cells
        )


def measure_cell(
    name: str,
    session: Session,
    workload: Workload,
    prompts: PromptMaker,
    *,
    number: int = 0,
    num_warm_up: int | None = None,
) -> Cell:
    """One cell of round `number`; one that fails says why."""
    try:
        own = _with_own_texts(workload, number)
        summary = session.measure(own, prompts, num_warm_up=num_warm_up)
    except BenchmarkError as error:
        return Cell(peer=name, workload=workload, summary=None, error=str(error))
    return Cell(peer=name, workload=workload, summary=summary)


def _with_own_texts(workload: Workload, number: int) -> Workload:
    """The workload with prompts that no other cell has; for every peer the same.

    A peer that keeps beginnings of prompts would find those of an earlier cell.
    """
    own = f"{workload.seed}, {number}, {workload.num_clients}, {workload.popularity}"
    return replace(workload, seed=random.Random(own).getrandbits(48))


def outcome(cell: Cell) -> str:
    """A cell in a few words."""
    if cell.summary is None:
        return f"failed: {cell.error}"
    return f"{cell.summary.tokens_per_s:.1f} tok/s"


def _same(cell: Cell, number: int, name: str, workload: Workload) -> bool:
    return (cell.round, cell.peer, cell.workload) == (number, name, workload)


def _check_room() -> None:
    if (free := psutil.virtual_memory().available) < _ROOM:
        raise PeerUnavailable(
            f"beside the peers before it {free >> 20} MiB of memory are free, of {_ROOM >> 20} "
            "that it is to have; name fewer with --peers"
        )
