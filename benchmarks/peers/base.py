"""What a peer is: something that starts with a base and adapters, and measures workloads."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import uvloop

from benchmarks.load import connect, measure
from benchmarks.peers.process import ServerProcess
from benchmarks.stats import Summary
from benchmarks.wire import Wire
from benchmarks.workload import PromptMaker, Workload, warm_up_requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every peer starts with.

    `adapters` are PEFT folders, in the order of the workload's indices; `cache` keeps what
    peers install; `logs` takes the output of what they start; `scratch` is for files that go
    with the run. `dtype` is torch's name. A request has at most `context_length` tokens, answer
    included.
    """

    base: Path
    adapters: list[Path]
    cache: Path
    logs: Path
    scratch: Path
    dtype: str = "float32"
    context_length: int


class Session(Protocol):
    """A started peer, asleep until it is awake."""

    @property
    def version(self) -> str:
        """The peer's version and the settings that matter, in one line."""
        ...

    @property
    def weights(self) -> str:
        """The number format of the base's weights, as the peer calls it."""
        ...

    def awake(self) -> AbstractContextManager[object]:
        """Let the peer run until the block is left; it takes no processor time outside."""
        ...

    def measure(
        self, workload: Workload, prompts: PromptMaker, *, num_warm_up: int | None = None
    ) -> Summary:
        """Warm up with `num_warm_up` requests (one a client) and run one cell.

        Raises BenchmarkError.
        """
        ...


class Peer(Protocol):
    """Something to measure."""

    @property
    def name(self) -> str:
        """The name on the command line and in the table."""
        ...

    @property
    def has_adapters(self) -> bool:
        """Whether it is started with adapters; else it answers for the base alone."""
        ...

    def session(self, setup: Setup) -> AbstractContextManager[Session]:
        """Start, and end on leaving. Raises PeerUnavailable with the reason."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSession:
    """A peer that is a server: measured by the closed loop over HTTP.

    Without `process`, the server is somebody else's and never sleeps.
    """

    url: str
    wire: Wire
    version: str
    weights: str = "unknown"
    process: ServerProcess | None = None

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let the server run until the block is left."""
        if self.process is None:
            yield
            return
        self.process.resume()
        try:
            yield
        finally:
            self.process.pause()

    def measure(
        self, workload: Workload, prompts: PromptMaker, *, num_warm_up: int | None = None
    ) -> Summary:
        """Warm up and run one cell. Raises BenchmarkError."""
        # Reads a stream with a third less of the processor that the server needs too.
        return uvloop.run(self._measure(workload, prompts, num_warm_up))

    async def _measure(
        self, workload: Workload, prompts: PromptMaker, num_warm_up: int | None
    ) -> Summary:
        warm_up = warm_up_requests(workload, prompts, num_warm_up)
        async with connect(self.url) as http:
            return await measure(http, self.wire, workload, prompts, warm_up=warm_up)
