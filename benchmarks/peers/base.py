"""What a peer is: something that starts with a base and adapters, and measures workloads."""

import asyncio
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

from benchmarks.load import measure
from benchmarks.stats import Summary
from benchmarks.wire import Wire
from benchmarks.workload import PromptMaker, Workload

# A request of a slow peer at many clients may take minutes; nothing is given up before.
TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every peer starts with.

    `adapters` are PEFT folders, in the order of the workload's indices; `cache` keeps what
    peers install; `logs` takes the output of what they start. `dtype` is torch's name.
    """

    base: Path
    adapters: list[Path]
    cache: Path
    logs: Path
    dtype: str = "float32"
    context_length: int = 1024


class Session(Protocol):
    """A started peer."""

    @property
    def version(self) -> str:
        """The peer's version and the settings that matter, in one line."""
        ...

    def measure(self, workload: Workload, prompts: PromptMaker) -> Summary:
        """Warm up and run one cell. Raises BenchmarkError."""
        ...


class Peer(Protocol):
    """Something to measure."""

    @property
    def name(self) -> str:
        """The name on the command line and in the table."""
        ...

    def session(self, setup: Setup) -> AbstractContextManager[Session]:
        """Start, and end on leaving. Raises PeerUnavailable with the reason."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSession:
    """A peer that is a server: measured by the closed loop over HTTP."""

    url: str
    wire: Wire
    version: str

    def measure(self, workload: Workload, prompts: PromptMaker) -> Summary:
        """Warm up and run one cell. Raises BenchmarkError."""
        return asyncio.run(self._measure(workload, prompts))

    async def _measure(self, workload: Workload, prompts: PromptMaker) -> Summary:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(
            base_url=self.url, timeout=TIMEOUT_S, limits=limits, trust_env=False
        ) as http:
            return await measure(http, self.wire, workload, prompts)
