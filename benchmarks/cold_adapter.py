"""The first request to an adapter that is not on the device, against one to an adapter that is.

    python -m benchmarks.cold_adapter

Adapters of rank 16 on every linear layer are uploaded and the server is started again, so that
none is on the device; the operating system is asked to forget the store's files. Then each
adapter gets a first, cold request and a second, warm one, with other prompts: once while the
server is idle otherwise, once while other clients keep it busy. Asked is that the cold one's
first token comes at most one extra step plus the time to read the adapter later.
"""

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp

from benchmarks.command import RESULTS, command, counts, exit_with_reason, say, write_json
from benchmarks.load import closed_loop, connect, send_streaming
from benchmarks.machine import describe_machine
from benchmarks.peers.adapters import make_adapters
from benchmarks.peers.dynamic_lora import NO_DRAFTS, serving, totals, upload
from benchmarks.peers.process import end_on_sigterm
from benchmarks.report import table
from benchmarks.stats import Timing
from benchmarks.wire import DynamicLoraWire
from benchmarks.workload import Popularity, PromptMaker, Request, Workload, requests

_HEADER = (
    "other clients",
    "warm TTFT ms",
    "cold TTFT ms",
    "later by ms",
    "read ms",
    "step ms",
    "read + step ms",
    "reached",
    "read alone ms",
)
_NUM_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One adapter's first request and its second.

    Seconds; `read_s` is what the server says reading it took, the step the second's TPOT.
    """

    cold_ttft_s: float
    read_s: float
    warm_ttft_s: float
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All pairs with so many other clients; `read_alone_s` is one adapter read by nobody else."""

    num_other_clients: int
    pairs: list[Pair]
    read_alone_s: float

    @property
    def later_s(self) -> float:
        """By how much a cold first token comes later: the median over the adapters."""
        return statistics.median(pair.cold_ttft_s - pair.warm_ttft_s for pair in self.pairs)

    @property
    def step_s(self) -> float:
        """One step, the median."""
        return statistics.median(pair.step_s for pair in self.pairs)

    @property
    def read_s(self) -> float:
        """The time to read one in the server, the median."""
        return statistics.median(pair.read_s for pair in self.pairs)

    @property
    def reached(self) -> bool:
        """Whether the delay is at most one step plus the reading."""
        return self.later_s <= self.step_s + self.read_s


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = command("cold_adapter", __doc__)
    root.add_argument("--adapters", type=int, default=8, help="cold ones for each line")
    root.add_argument("--other-clients", type=counts, default=[0, 8], help="as 0,8")
    root.add_argument("--base", help="base model: folder or Hub id (default: the embedded one)")
    root.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/)")
    return root


class Probe:
    """Single requests to a running server, timed, beside a background of others."""

    def __init__(
        self, http: aiohttp.ClientSession, wire: DynamicLoraWire, prompts: PromptMaker
    ) -> None:
        self._http = http
        self._wire = wire
        self._prompts = prompts
        self._rng = random.Random(0)

    async def send(self, adapter: int | None) -> Timing:
        """One request. Raises RequestFailed."""
        prompt = self._prompts.make(self._rng)
        request = Request(prompt=prompt, adapter=adapter, num_output_tokens=_NUM_TOKENS)
        return await send_streaming(self._http, self._wire, request)

    async def pair(self, adapter: int) -> Pair:
        """A first and a second request to an adapter. Raises RequestFailed."""
        before = await self._read_s()
        cold = await self.send(adapter)
        read_s = await self._read_s() - before
        warm = await self.send(adapter)
        assert warm.tpot is not None
        return Pair(cold_ttft_s=cold.ttft, read_s=read_s, warm_ttft_s=warm.ttft, step_s=warm.tpot)

    async def _read_s(self) -> float:
        """Seconds that the server has read adapters for; nobody else's are cold meanwhile."""
        [seconds] = await totals(self._http, "adapter_read_seconds")
        return seconds

    @asynccontextmanager
    async def others(self, num_clients: int) -> AsyncIterator[None]:
        """Keep so many clients busy with requests to the first adapter until the block ends."""
        if not num_clients:
            yield
            return
        workload = Workload(
            num_clients=num_clients, popularity=Popularity("one"), seconds=1e6, seed=1
        )

        async def send(request: Request) -> Timing:
            return await send_streaming(self._http, self._wire, request)

        work = requests(workload, self._prompts)
        task = asyncio.create_task(closed_loop(send, work, num_clients=num_clients))
        try:
            await asyncio.sleep(1.0)
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])


def forget_files(folder: Path) -> None:
    """Ask the operating system to drop a folder's files from its cache (Linux)."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def read_alone_seconds(base: Path, home: Path, names: Sequence[str]) -> float:
    """What the server does to read an adapter of its store, timed in a process of its own: the
    median.

    On one thread, as the server keeps it, and from files that were dropped from the cache. A
    server's reading takes longer where the system has to find memory for the files' pages.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from dynamic_lora_adapters.geometry import BaseGeometry
    from dynamic_lora_adapters.home.registry import AdapterRegistry
    from dynamic_lora_server.base.base_model import resolve_base

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    # A store's names belong to the base that they were uploaded for, as the server calls it.
    geometry = BaseGeometry.of(model, model_id=resolve_base(str(base)).name)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    with AdapterRegistry(home, geometry, dtype=torch.float32) as registry:
        forget_files(home)
        for name in names:
            digest = registry.resolve(name).digest
            began = time.perf_counter()
            registry.load(digest)
            times.append(time.perf_counter() - began)
    torch.set_num_threads(num_threads)
    return statistics.median(times)


async def probe(
    url: str, wire: DynamicLoraWire, prompts: PromptMaker, options: argparse.Namespace
) -> dict[int, list[Pair]]:
    """All pairs, by the number of other clients. Raises RequestFailed."""
    pairs: dict[int, list[Pair]] = {}
    async with connect(url) as http:
        probes = Probe(http, wire, prompts)
        # The first adapter is for the others; it also pays for what only happens once.
        for adapter in (None, 0, 0):
            await probes.send(adapter)
        following = iter(range(1, len(wire.names)))
        for num_others in options.other_clients:
            async with probes.others(num_others):
                pairs[num_others] = [
                    await probes.pair(next(following)) for _ in range(options.adapters)
                ]
            say(f"{num_others} other clients: {options.adapters} cold adapters asked")
    return pairs


def measure(options: argparse.Namespace, base: Path, prompts: PromptMaker) -> list[Result]:
    """Upload, start again, ask, read. Raises BenchmarkError."""
    num_adapters = 1 + options.adapters * len(options.other_clients)
    with tempfile.TemporaryDirectory() as scratch:
        folder, home = Path(scratch) / "adapters", Path(scratch) / "home"
        log = Path(scratch) / "serve.log"
        say(f"making and uploading {num_adapters} adapters")
        folders = make_adapters(base, folder, num_adapters=num_adapters)
        with serving(base, home, log, NO_DRAFTS) as (url, _):
            names = upload(url, folders)
        with serving(base, home, log, NO_DRAFTS) as (url, _):
            forget_files(home)
            pairs = asyncio.run(probe(url, DynamicLoraWire(names), prompts, options))
        read_alone_s = read_alone_seconds(base, home, names)
    return [
        Result(num_other_clients=number, pairs=found, read_alone_s=read_alone_s)
        for number, found in pairs.items()
    ]


def to_markdown(results: Sequence[Result]) -> str:
    """The table."""
    return "\n".join(table(_HEADER, map(_columns, results)))


def _columns(result: Result) -> list[str]:
    warm = statistics.median(pair.warm_ttft_s for pair in result.pairs)
    cold = statistics.median(pair.cold_ttft_s for pair in result.pairs)
    seconds = (warm, cold, result.later_s, result.read_s, result.step_s)
    bar = result.read_s + result.step_s
    return [
        str(result.num_other_clients),
        *(f"{value * 1e3:.0f}" for value in (*seconds, bar)),
        "yes" if result.reached else "no",
        f"{result.read_alone_s * 1e3:.0f}",
    ]


def main() -> None:
    """Measure, print the table, write the JSON."""
    from transformers import AutoTokenizer

    from dynamic_lora_server.base.base_model import resolve_base

    end_on_sigterm()
    options = parser().parse_args()
    base = resolve_base(options.base).path
    prompts = PromptMaker(AutoTokenizer.from_pretrained(base), 64)
    with exit_with_reason("cold_adapter"):
        results = measure(options, base, prompts)
    machine = describe_machine()
    output = options.output or RESULTS / f"cold-adapter-{machine.slug}.json"
    found = [
        {**asdict(r), "read_s": r.read_s, "later_s": r.later_s, "reached": r.reached}
        for r in results
    ]
    document = {"machine": asdict(machine), "num_prompt_tokens": 64, "results": found}
    write_json(document, output)
    say(f"written: {output}")
    print(to_markdown(results))


if __name__ == "__main__":
    main()
