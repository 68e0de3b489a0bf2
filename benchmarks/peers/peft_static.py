"""PEFT's mixed batch in this process: `generate(adapter_names=[...])`, one static batch at a time.

No HTTP and no queue: a batch of as many rows as the workload has clients is generated to its
end, then the next one. The closed loop's equal lengths make that PEFT's best case.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.peers.base import Session, Setup


@dataclass(frozen=True, slots=True)
class PeftStatic:
    """PEFT on this environment's torch and transformers."""

    name: str = "peft-static"

    @contextmanager
    def session(self, setup: Setup) -> Iterator[Session]:
        """Load the base and every adapter; free them on leaving."""
        # Here, so that measuring another server does not load torch beside it.
        from benchmarks.peers.peft_session import opened

        with opened(setup) as session:
            yield session
