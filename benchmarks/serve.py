"""Closed-loop load generator: one running server, or this project's beside its peers.

    python -m benchmarks.serve --url http://127.0.0.1:8000 --upload
    python -m benchmarks.serve --url http://127.0.0.1:9000 --api openai --names a,b --model base
    python -m benchmarks.serve --compare

See benchmarks/README.md for what is measured and how.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from platformdirs import user_cache_path

from benchmarks.errors import BenchmarkError, PeerUnavailable
from benchmarks.machine import describe_machine
from benchmarks.peers import PEERS, HttpSession, Session, Setup
from benchmarks.peers.adapters import make_adapters
from benchmarks.peers.dynamic_lora import upload
from benchmarks.report import Cell, Report
from benchmarks.wire import DynamicLoraWire, LlamaCppWire, OpenAIWire, Wire
from benchmarks.workload import Popularity, PromptMaker, Workload

RESULTS = Path(__file__).parent / "results"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(
        prog="python -m benchmarks.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    target = root.add_mutually_exclusive_group(required=True)
    target.add_argument("--url", help="measure the server that runs at this address")
    target.add_argument("--compare", action="store_true", help="start and measure every peer")
    _add_workload(root.add_argument_group("workload"))
    _add_server(root.add_argument_group("with --url"))
    _add_peers(root.add_argument_group("with --compare"))
    root.add_argument("--base", help="base model: folder or Hub id (default: the embedded one)")
    root.add_argument("--output", type=Path, help="JSON file (--compare: benchmarks/results/)")
    return root


def _add_workload(group: argparse._ArgumentGroup) -> None:
    popularities = "of base, uniform, one, zipf:S; as base,uniform"
    group.add_argument("--clients", type=_counts, default=[1, 8, 32], help="as 1,8,32")
    group.add_argument("--adapters", type=int, default=8, help="number of adapters")
    group.add_argument("--popularity", type=_words, default=["base", "uniform"], help=popularities)
    group.add_argument("--prompt-tokens", type=int, default=64)
    group.add_argument("--output-tokens", type=int, default=64)
    length = group.add_mutually_exclusive_group()
    length.add_argument("--requests", type=int, help="per cell (default: 4 a client, at least 8)")
    length.add_argument("--seconds", type=float, help="per cell, instead of a number of requests")
    group.add_argument("--seed", type=int, default=0)


def _add_server(group: argparse._ArgumentGroup) -> None:
    apis = ["dynamic-lora", "openai", "llama.cpp"]
    group.add_argument("--api", choices=apis, default=apis[0])
    group.add_argument("--names", type=_words, help="adapters' names (default bench-0, ...)")
    group.add_argument("--model", default="base", help="openai: the base model's name")
    group.add_argument(
        "--upload", action="store_true", help="dynamic-lora: upload random adapters first"
    )


def _add_peers(group: argparse._ArgumentGroup) -> None:
    # llama.cpp is compiled on first use, which takes long: only when it is asked for.
    default = [name for name in PEERS if name != "llama.cpp"]
    cache = user_cache_path("dynamic-lora") / "benchmarks"
    names = f"of {', '.join(PEERS)} (default: all but llama.cpp, which is compiled here)"
    group.add_argument("--peers", type=_peers, default=default, help=names)
    group.add_argument("--dtype", default="float32", help="for every peer that has a choice")
    group.add_argument("--cache", type=Path, default=cache, help="where peers are installed")


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _counts(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def _peers(text: str) -> list[str]:
    for name in _words(text):
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"{name!r}: expected one of {', '.join(PEERS)}")
    return _words(text)


def workloads(options: argparse.Namespace) -> list[Workload]:
    """Every cell of a run, popularity by popularity. Raises InvalidWorkload."""
    return [
        Workload(
            num_clients=num_clients,
            popularity=Popularity.parse(popularity),
            num_adapters=len(options.names) if options.names else options.adapters,
            num_prompt_tokens=options.prompt_tokens,
            num_output_tokens=options.output_tokens,
            num_requests=None if options.seconds else options.requests or max(8, 4 * num_clients),
            seconds=options.seconds,
            seed=options.seed,
        )
        for popularity in options.popularity
        for num_clients in options.clients
    ]


def run_cells(
    name: str,
    session: Session,
    cells: list[Workload],
    prompts: PromptMaker,
    report: Report,
    say: Callable[[str], None],
) -> None:
    """Measure every cell of one peer into the report; a cell that fails is noted and passed."""
    report.versions[name] = session.version
    for number, workload in enumerate(cells, start=1):
        where = f"{workload.popularity}, {workload.num_clients} clients"
        say(f"{name}: cell {number} of {len(cells)}: {where}")
        try:
            summary = session.measure(workload, prompts)
        except BenchmarkError as error:
            report.cells.append(Cell(peer=name, workload=workload, summary=None, error=str(error)))
            say(f"  failed: {error}")
        else:
            report.cells.append(Cell(peer=name, workload=workload, summary=summary))
            say(f"  {summary.tokens_per_s:.1f} tok/s")


def compare(
    options: argparse.Namespace,
    setup: Setup,
    cells: list[Workload],
    prompts: PromptMaker,
    report: Report,
) -> None:
    """Run the peers one after another; one that cannot start is left out with its reason."""
    for name in options.peers:
        _say(f"{name}: starting")
        try:
            with PEERS[name].session(setup) as session:
                run_cells(name, session, cells, prompts, report, _say)
        except PeerUnavailable as reason:
            report.left_out[name] = str(reason)
            _say(f"{name}: left out: {reason}")


def measure_url(
    options: argparse.Namespace,
    base: Path,
    cells: list[Workload],
    prompts: PromptMaker,
    report: Report,
) -> None:
    """Measure the server at `--url`, uploading adapters first where asked."""
    url = options.url.rstrip("/")
    names = options.names or [f"bench-{index}" for index in range(options.adapters)]
    if options.upload:
        if options.api != "dynamic-lora" or options.names:
            raise BenchmarkError("--upload goes with --api dynamic-lora and without --names")
        with tempfile.TemporaryDirectory() as folder:
            _say(f"uploading {options.adapters} adapters")
            upload(url, make_adapters(base, Path(folder), num_adapters=options.adapters))
    session = HttpSession(url=url, wire=_wire(options, names), version=f"{options.api} at {url}")
    run_cells(options.api, session, cells, prompts, report, _say)


def _wire(options: argparse.Namespace, names: list[str]) -> Wire:
    if options.api == "openai":
        return OpenAIWire(options.model, names)
    return LlamaCppWire(len(names)) if options.api == "llama.cpp" else DynamicLoraWire(names)


def run(options: argparse.Namespace) -> Report:
    """A whole run, as the command line asks. Raises BenchmarkError."""
    from transformers import AutoTokenizer

    from dynamic_lora_server.base_model import resolve_base

    base = resolve_base(options.base)
    started = datetime.now(UTC).replace(microsecond=0)
    report = Report(machine=describe_machine(), base=base.name, started_at=started.isoformat())
    cells = workloads(options)
    prompts = PromptMaker(AutoTokenizer.from_pretrained(base.path), options.prompt_tokens)
    if not options.compare:
        measure_url(options, base.path, cells, prompts, report)
        return report
    options.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        _say(f"making {options.adapters} random adapters")
        setup = Setup(
            base=base.path,
            adapters=make_adapters(base.path, Path(folder), num_adapters=options.adapters),
            cache=options.cache.resolve(),
            logs=options.cache.resolve() / "logs",
            dtype=options.dtype,
        )
        compare(options, setup, cells, prompts, report)
    return report


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Run, print the table on standard output, write the JSON."""
    options = parser().parse_args()
    try:
        report = run(options)
    except BenchmarkError as error:
        raise SystemExit(f"benchmarks.serve: {error}") from error
    print(report.to_markdown())
    stamp = report.started_at.replace(":", "").replace("+0000", "Z")
    output = options.output or (RESULTS / f"{stamp}.json" if options.compare else None)
    if output is not None:
        report.write(output)
        _say(f"written: {output}")


if __name__ == "__main__":
    main()
