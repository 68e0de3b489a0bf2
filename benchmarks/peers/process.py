"""Start a server as a process of its own, wait until it answers, and end it."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.errors import PeerUnavailable


def end_on_sigterm() -> None:
    """Have SIGTERM leave all blocks, so that what they started is ended."""

    def leave(number: int, frame: object) -> None:
        del frame
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def free_port() -> int:
    """A TCP port of the loopback address that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A running server: a process group whose first process is `pid`."""

    pid: int

    def pause(self) -> None:
        """Stop every process of the group: it keeps its memory and takes no processor time."""
        os.killpg(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused group run on."""
        os.killpg(self.pid, signal.SIGCONT)

    def resident_bytes(self) -> int:
        """Resident memory of the first process (Linux)."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024


@contextmanager
def running(
    command: Sequence[str],
    *,
    ready_url: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
) -> Iterator[ServerProcess]:
    """Run `command` until the block is left; its output goes to `log`.

    The block is entered when `ready_url` answers 200. Raises PeerUnavailable where that
    does not come, with the end of the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            # A group of its own: what the server itself starts ends with it.
            start_new_session=True,
        )
        try:
            _wait_until_ready(process, ready_url, log, timeout_s)
            yield ServerProcess(process.pid)
        finally:
            _end(process)


def _wait_until_ready(
    process: subprocess.Popen[bytes], url: str, log: Path, timeout_s: float
) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if process.poll() is not None:
            raise PeerUnavailable(f"it ended at start, status {process.returncode}: {tail(log)}")
        try:
            if httpx.get(url, timeout=5.0, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.25)
    raise PeerUnavailable(f"not ready after {timeout_s:.0f} s: {tail(log)}")


def tail(log: Path, num_lines: int = 5) -> str:
    """The last lines of a log, in one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return " | ".join([line for line in lines if line][-num_lines:]) or "it printed nothing"


def _end(process: subprocess.Popen[bytes], grace_s: float = 20.0) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            # A paused group sees the signal once it runs again.
            os.killpg(process.pid, signal.SIGCONT)
        except ProcessLookupError:
            break
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
