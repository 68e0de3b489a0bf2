"""Other processes that compute while something is measured."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_FOR_EVER = "while True: pass"


@contextmanager
def busy(num_processes: int) -> Iterator[None]:
    """Have so many processes, of one thread each, compute until the block ends."""
    processes = [
        subprocess.Popen([sys.executable, "-S", "-c", _FOR_EVER]) for _ in range(num_processes)
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
