"""Traces as the server records them."""

from collections.abc import Iterable
from pathlib import Path

from dynamic_lora_server.recorder import Arrival, TraceRecorder


def record(path: Path, arrivals: Iterable[Arrival]) -> None:
    """Record `arrivals` in this order to a new file."""
    recorder = TraceRecorder(path)
    for arrival in arrivals:
        recorder.record(arrival)
    recorder.close()
