"""PEFT's mixed batch in this process: `generate(adapter_names=[...])`, one static batch at a time.

No HTTP and no queue: a batch of as many rows as the workload has clients is generated to its
end, then the next one. The closed loop's equal lengths make that PEFT's best case.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from benchmarks.peers.base import Session, Setup


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftStatic:
    """PEFT on this environment's torch and transformers."""

    # None is what the comparison runs every peer with.
    dtype: str | None = None

    @property
    def name(self) -> str:
        """`peft-static`, with a dtype of its own behind it."""
        return "peft-static" if self.dtype is None else f"peft-static-{self.dtype}"

    @property
    def has_adapters(self) -> bool:
        """It always is started with them."""
        return True

    @contextmanager
    def session(self, setup: Setup) -> Iterator[Session]:
        """Load the base and every adapter; free them on leaving."""
        setup = setup if self.dtype is None else replace(setup, dtype=self.dtype)
        # Here, so that measuring another server does not load torch beside it.
        from benchmarks.peers.peft_session import opened

        with opened(setup) as session:
            yield session
