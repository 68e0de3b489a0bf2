"""A trace of what is served: who asked for what, and when. Imports no torch."""

import json
import logging
import math
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request of a trace; `adapter` None is the base model. Raises ValueError."""

    arrival_s: float
    adapter: str | None
    num_prompt_tokens: int
    num_output_tokens: int

    def __post_init__(self) -> None:
        if not 0 <= self.arrival_s < math.inf:
            raise ValueError(f"arrival_s must be finite and at least 0, got {self.arrival_s}")
        if self.num_prompt_tokens < 1 or self.num_output_tokens < 1:
            raise ValueError("num_prompt_tokens and num_output_tokens must be at least 1")


class TraceRecorder:
    """Writes a trace, a line of JSON with the fields of `Arrival` as each answer ends.

    No trace is written over: where the file has one, `path` becomes the same name with the next
    number, as `trace-2.jsonl`. Raises OSError. If the disk fails later, recording ends, with a
    warning, and serving goes on.
    """

    def __init__(self, path: Path) -> None:
        self.path = _unwritten(path)
        self._file: TextIO | None = self.path.open("w", buffering=1, encoding="utf-8")
        self._began = time.monotonic()

    def now(self) -> float:
        """Seconds since recording began."""
        return time.monotonic() - self._began

    def record(self, arrival: Arrival) -> None:
        """Write one answer."""
        file = self._file
        if file is None or file.closed:
            return
        try:
            file.write(json.dumps(asdict(arrival)) + "\n")
        except (OSError, ValueError) as error:  # ValueError: closed by another thread meanwhile
            logger.warning("The trace ends here: %s", error)
            self.close()

    def close(self) -> None:
        """End recording."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()


def _unwritten(path: Path) -> Path:
    """The first of `trace.jsonl`, `trace-2.jsonl` and so on that is not there, or empty."""
    number, free = 1, path
    while free.exists() and free.stat().st_size:
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free
