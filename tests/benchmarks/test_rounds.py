"""A comparison in rounds, with peers that only pretend."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from benchmarks import serve
from benchmarks.cells import Cell
from benchmarks.errors import BenchmarkError, InvalidWorkload, PeerUnavailable
from benchmarks.limit_rate import Limit
from benchmarks.machine import Machine
from benchmarks.neighbours import busy
from benchmarks.peers import DynamicLora, Session, Setup
from benchmarks.report import Report
from benchmarks.rounds import Choice, Rounds
from benchmarks.serve import parser, workloads
from benchmarks.stats import Summary, Timing, summarise
from benchmarks.workload import Popularity, PromptMaker, Workload


@pytest.fixture(autouse=True)
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else runs on this machine."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**40))


class _OneWord:
    def get_vocab(self) -> dict[str, int]:
        return {"word": 0}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return tokens[0]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        del add_special_tokens
        return [0] * len(text.split())


@dataclass(slots=True)
class _Session:
    name: str
    log: list[str]
    version: str = "1.0"
    weights: str = "float32"
    is_awake: bool = False

    @contextmanager
    def awake(self) -> Iterator[None]:
        self.is_awake = True
        yield
        self.is_awake = False

    def measure(
        self, workload: Workload, prompts: PromptMaker, *, num_warm_up: int | None = None
    ) -> Summary:
        del prompts
        assert self.is_awake
        self.log.append(f"{self.name} {workload.popularity} {workload.num_clients} {num_warm_up}")
        if workload.num_clients == 2:
            raise BenchmarkError("too many clients")
        timing = Timing(sent=0, first_token=1, last_token=2, num_output_tokens=2)
        return summarise([timing], wall_s=2.0)


@dataclass(frozen=True, slots=True)
class _Peer:
    name: str
    log: list[str]
    available: bool = True
    has_adapters: bool = True

    @contextmanager
    def session(self, setup: Setup) -> Iterator[Session]:
        del setup
        if not self.available:
            raise PeerUnavailable("no wheel")
        yield _Session(self.name, self.log)


@dataclass(slots=True)
class _Clock:
    now: float = 0.0

    def read(self) -> float:
        self.now += 1
        return self.now


class _Limit:
    def measure(self, num_clients: int, num_prompt_tokens: int, num_output_tokens: int) -> Limit:
        assert (num_prompt_tokens, num_output_tokens) == (4, 2)
        return Limit(
            num_clients=num_clients,
            step_s=0.1,
            prefill_s=0.1,
            gbytes_per_s=1.0,
            bound="products",
            tokens_per_s=10.0,
        )


@dataclass(slots=True)
class _Run:
    """What one run did: the measurements in order, what was said, how often it was saved."""

    report: Report
    log: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    num_saved: int = 0

    def save(self) -> None:
        self.num_saved += 1


def _report() -> Report:
    machine = Machine(
        cpu="a processor",
        num_cores=2,
        cpu_flags=[],
        memory_gib=1.0,
        gpu=None,
        system="an operating system",
        python="3.11",
        packages={},
    )
    return Report(machine=machine, base="base", started_at="now")


def _workload(num_clients: int = 1, popularity: str = "base") -> Workload:
    return Workload(
        num_clients=num_clients,
        popularity=Popularity.parse(popularity),
        num_prompt_tokens=4,
        num_output_tokens=2,
        num_requests=1,
    )


def _run(
    cells: Sequence[Workload],
    choices: Sequence[Choice],
    run: _Run,
    *,
    num_rounds: int = 1,
    folder: Path = Path(),
) -> None:
    Rounds(
        setup=Setup(
            base=folder,
            adapters=[],
            cache=folder,
            logs=folder,
            scratch=folder,
            context_length=192,
        ),
        workloads=cells,
        num_rounds=num_rounds,
        prompts=PromptMaker(_OneWord(), 4),
        report=run.report,
        clock=_Clock(),
        limit=_Limit(),
        save=run.save,
        say=run.said.append,
    ).run(choices)


def test_peers_take_turns_and_turn_round() -> None:
    run = _Run(_report())
    choices = [Choice(peer=_Peer(name, run.log)) for name in ("a", "b")]
    _run([_workload(), _workload(popularity="uniform")], choices, run, num_rounds=2)
    first = ["a base 1 None", "a uniform 1 None", "b base 1 None", "b uniform 1 None"]
    second = ["b base 1 8", "b uniform 1 8", "a base 1 8", "a uniform 1 8"]
    assert run.log == first + second
    assert [cell.round for cell in run.report.cells] == [0] * 4 + [1] * 4
    assert [cell.round for cell in run.report.limits] == [0, 1]
    assert run.report.cells[0].clocks == (1.0, 2.0)
    assert run.num_saved == 10


def test_a_peer_without_adapters_answers_for_the_base_alone() -> None:
    run = _Run(_report())
    choices = [Choice(peer=_Peer("a", run.log, has_adapters=False))]
    _run([_workload(), _workload(popularity="uniform")], choices, run)
    assert run.log == ["a base 1 None"]


def test_no_two_cells_have_the_same_prompts_and_all_peers_have_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that keeps beginnings of prompts would find in one cell what another computed."""
    seen: dict[str, list[int]] = {"a": [], "b": []}
    measure = _Session.measure

    def recording(
        self: _Session, workload: Workload, prompts: PromptMaker, *, num_warm_up: int | None = None
    ) -> Summary:
        seen[self.name].append(workload.seed)
        return measure(self, workload, prompts, num_warm_up=num_warm_up)

    monkeypatch.setattr(_Session, "measure", recording)
    run = _Run(_report())
    cells = [_workload(n, kind) for n in (1, 8) for kind in ("base", "uniform")]
    choices = [Choice(peer=_Peer(name, run.log)) for name in ("a", "b")]
    _run(cells, choices, run, num_rounds=2)
    assert len(seen["a"]) == len(set(seen["a"])) == 8
    assert seen["a"] == seen["b"]
    assert {cell.workload.seed for cell in run.report.cells} == {0}


def test_a_cell_that_fails_does_not_end_the_run() -> None:
    run = _Run(_report())
    _run([_workload(2), _workload(1)], [Choice(peer=_Peer("a", run.log))], run)
    assert [cell.error for cell in run.report.cells] == ["too many clients", None]
    assert run.report.versions == {"a": "1.0"}
    assert any("failed: too many clients" in text for text in run.said)


def test_a_peer_that_memory_is_too_short_for_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system would end one of them, as a rule the one that measures."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**32))
    run = _Run(_report())
    _run([_workload()], [Choice(peer=_Peer(name, run.log)) for name in ("a", "b")], run)
    assert run.log == ["a base 1 None"]
    assert list(run.report.left_out) == ["b"]
    assert "4096 MiB of memory are free, of 5120" in run.report.left_out["b"]


def test_a_peer_that_cannot_start_is_left_out() -> None:
    run = _Run(_report())
    peers = [_Peer("a", run.log, available=False), _Peer("b", run.log)]
    _run([_workload()], [Choice(peer=peer) for peer in peers], run)
    assert run.report.left_out == {"a": "no wheel"}
    assert {cell.peer for cell in run.report.cells} == {"b"}


def test_a_resumed_run_measures_only_what_is_missing() -> None:
    run = _Run(_report())
    choices = [Choice(peer=_Peer("a", run.log)), Choice(peer=_Peer("b", run.log))]
    _run([_workload(1), _workload(2)], choices[:1], run)
    run.log.clear()
    _run([_workload(1), _workload(2)], choices, run)
    # The cell that failed is tried again, and replaced.
    assert run.log == ["b base 1 None", "a base 2 None", "b base 2 None"]
    assert len(run.report.cells) == 4
    run.log.clear()
    _run([_workload(1)], choices, run)
    assert run.log == []
    assert run.said[-1] != "a: starting"


def test_one_adapter_at_many_clients_is_asked_of_this_server_alone() -> None:
    run = _Run(_report())
    choices = [Choice(peer=_Peer(name, run.log)) for name in ("dynamic-lora", "other")]
    _run([_workload(n, "one") for n in (1, 8)], choices, run)
    asked = ["dynamic-lora one 1 None", "other one 1 None", "dynamic-lora one 8 None"]
    assert run.log == asked


def test_a_choice_may_be_for_some_numbers_of_clients() -> None:
    assert Choice.parse("vllm-cpu").clients is None
    assert Choice.parse("llama.cpp-q8_0@1+32").clients == frozenset({1, 32})
    run = _Run(_report())
    choice = Choice(peer=_Peer("a", run.log), clients=frozenset({8}))
    _run([_workload(1), _workload(8)], [choice], run)
    assert run.log == ["a base 8 None"]


def test_a_variant_is_this_server_with_further_options() -> None:
    assert Choice.variant("bf16=--dtype bfloat16").peer == DynamicLora(
        name="dynamic-lora-bf16", flags=("--dtype", "bfloat16")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "nobody"], "'nobody': expected one of dynamic-lora, dynamic-lora-bf16"),
        (["--peers", "vllm-cpu@many"], "'vllm-cpu@many': expected numbers of clients"),
        (["--own", "int8"], "'int8': expected NAME=FLAGS"),
    ],
)
def test_an_unknown_peer_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--compare", *arguments])
    assert message in capsys.readouterr().err


def test_a_malformed_choice_is_named() -> None:
    with pytest.raises(InvalidWorkload, match="as vllm-cpu@1\\+32"):
        Choice.parse("vllm-cpu@")


@pytest.mark.parametrize(
    ("flags", "bfloat16", "eight_bits"),
    [
        (["avx2"], False, False),
        (["avx512_bf16"], True, False),
        (["avx512_vnni"], False, True),
        (["avx512_vnni", "amx_bf16"], True, True),
    ],
)
def test_peers_run_in_the_formats_that_processors_multiply(
    flags: list[str], bfloat16: bool, eight_bits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "cpu_flags", lambda: flags)
    names = [Choice.parse(text).peer.name for text in serve.default_peers().split(",")]
    assert {"vllm-cpu", "vllm-cpu-base", "llama.cpp-unified", "peft-static"} <= set(names)
    assert ("vllm-cpu-bfloat16" in names) is bfloat16
    assert ("dynamic-lora-w8a8" in names) is (eight_bits or "avx2" in flags)
    for name in ("vllm-cpu-w8a8", "vllm-cpu-w8a8-base"):
        assert (name in names) is eight_bits
    assert len(names) == len(set(names))


def test_workloads_of_a_comparison_end_by_time() -> None:
    options = parser().parse_args(["--compare", "--clients", "1,8"])
    cells = [
        (str(w.popularity), w.num_clients, w.num_requests, w.seconds) for w in workloads(options)
    ]
    assert cells[:2] == [("base", 1, None, 30.0), ("base", 8, None, 30.0)]
    assert [name for name, *_ in cells[2:]] == ["uniform", "uniform", "one", "one"]


def test_workloads_of_a_server_are_every_popularity_at_every_number_of_clients() -> None:
    options = parser().parse_args(
        ["--url", "http://host", "--clients", "1,8", "--popularity", "base,zipf:1.2"]
    )
    cells = [(str(w.popularity), w.num_clients, w.num_requests) for w in workloads(options)]
    assert cells == [("base", 1, 8), ("base", 8, 32), ("zipf:1.2", 1, 8), ("zipf:1.2", 8, 32)]
    timed = parser().parse_args(["--url", "http://host", "--seconds", "3"])
    assert {(w.num_requests, w.seconds) for w in workloads(timed)} == {(None, 3.0)}


def test_a_cell_of_an_earlier_run_is_kept_as_it_is() -> None:
    run = _Run(_report())
    summary = summarise(
        [Timing(sent=0, first_token=1, last_token=2, num_output_tokens=2)], wall_s=9.0
    )
    kept = Cell(peer="a", workload=_workload(), summary=summary)
    run.report.cells.append(kept)
    _run([_workload()], [Choice(peer=_Peer("a", run.log))], run, num_rounds=2)
    assert run.report.cells[0] is kept
    assert run.log == ["a base 1 None"]


def test_other_processes_compute_until_the_block_ends() -> None:
    before = set(psutil.Process().children())
    with busy(2):
        running = set(psutil.Process().children()) - before
        assert len(running) == 2
    assert not any(process.is_running() for process in running)
