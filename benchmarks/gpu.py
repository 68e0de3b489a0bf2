"""What adapters cost on a GPU: steps of base, idle, merged and mixed bypass, in one run.

Models have the shapes of a Llama of 1B and of 8B parameters and random weights
in bfloat16; adapters have rank 16 on every linear layer. Cells take turns,
round by round; figures are medians over rounds, ratios are taken within a
round. Ends within `--minutes`, once engines are built: what finds no time is left out by
name. What is measured is written after every round, and a shape that fails is named in the file.

    python -m benchmarks.gpu --output benchmarks/results/gpu.json
    python -m benchmarks.gpu --shape llama-8b --no-peers --minutes 6
    python -m benchmarks.gpu --compile --output benchmarks/results/gpu-compiled.json

`--device cpu --tiny` runs the same code on a model of toy size.
"""

import argparse
import gc
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command import command, write_json
from benchmarks.errors import BenchmarkError
from benchmarks.gpu_engine import Plan, StepBench, table
from benchmarks.gpu_shapes import LLAMA_1B, LLAMA_8B, TINY, ModelShape
from benchmarks.machine import describe_machine
from dynamic_lora_server.errors import ServerError

GPU_PLAN = Plan(
    rows=(1, 8, 32, 64, 128, 256),
    num_rounds=3,
    num_steps=20,
    num_adapters=32,
    kv_memory=None,
    adapter_memory=None,
)
TINY_PLAN = Plan(
    rows=(1, 2), num_rounds=2, num_steps=2, num_adapters=32, kv_memory=2**23, adapter_memory=2**26
)
SHAPES = (LLAMA_1B, LLAMA_8B)
PEER_ROWS = (1, 8, 32)
_KNOWN = (BenchmarkError, ServerError)
# They say what they do at start, and why there are no graphs.
_LOGGED = ("dynamic_lora_adapters", "dynamic_lora_server")
_COPIES = 8
# Of a shape's time the engine may take so much; the rest is for the peers.
_ENGINE_SHARE = 0.75


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes per second read and written by copies of `num_bytes`, the median of ten.

    Several copies are timed together: one is over soon after it was launched.
    """
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(11):
        _synchronise(device)
        begin = time.perf_counter()
        for _ in range(_COPIES):
            target.copy_(source)
        _synchronise(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * num_bytes * _COPIES / statistics.median(seconds[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all shapes have in common; peers generate `num_peer_tokens`, and 0 is: no peers."""

    plan: Plan
    device: torch.device
    dtype: torch.dtype
    bandwidth: float
    num_peer_tokens: int
    compiled: bool
    graphs: bool


def measure_shape(shape: ModelShape, setting: Setting, seconds: float) -> Iterator[dict[str, Any]]:
    """Figures of one shape as they are found, within `seconds` or a cell more.

    Where steps should have been CUDA graphs and were not, `without_graphs` says so.
    """
    begin = time.monotonic()

    def spent(share: float) -> Callable[[], bool]:
        return lambda: time.monotonic() - begin > share * seconds

    peers = setting.num_peer_tokens > 0
    yield from _measure_engine(shape, setting, spent(_ENGINE_SHARE if peers else 1.0))
    _free(setting.device)
    if peers:
        from benchmarks.gpu_peers import measure_peers

        found = measure_peers(
            shape,
            setting.device,
            setting.dtype,
            rows=tuple(rows for rows in PEER_ROWS if rows <= max(setting.plan.rows)),
            num_tokens=setting.num_peer_tokens,
            out_of_time=spent(1.0),
        )
        _free(setting.device)
        yield {"peers": found}


def _measure_engine(
    shape: ModelShape, setting: Setting, out_of_time: Callable[[], bool]
) -> Iterator[dict[str, Any]]:
    bench = StepBench(
        shape,
        setting.plan,
        setting.device,
        setting.dtype,
        compiled=setting.compiled,
        graphs=setting.graphs,
    )
    yield {
        "weight_bytes": bench.weight_bytes,
        "attention": bench.attention,
        "kernels_us": bench.kernel_table(),
    }
    rounds = []
    for found in bench.rounds(out_of_time):
        rounds.append(found)
        cells = table(rounds)
        step_s = next(c["step_ms"] / 1e3 for c in cells if (c["cell"], c["rows"]) == ("base", 1))
        limit = bench.weight_bytes / setting.bandwidth / step_s
        yield {
            "num_rounds": len(rounds),
            "one_row_of_bandwidth_limit": round(limit, 4),
            "cells": cells,
            "graphs": bench.graphs(),
        }
    if left_out := bench.left_out(rounds):
        yield {"left_out": left_out}
    wanted = setting.graphs and setting.device.type == "cuda"
    if wanted and (reason := without_graphs(bench.graphs())):
        yield {"without_graphs": reason}


def without_graphs(graphs: dict[str, Any] | None) -> str | None:
    """Why figures are not those of CUDA graphs, from what the engine counted; None if they are."""
    if graphs is None:
        return "no CUDA graphs were captured; the log says why"
    if not graphs["replayed"]:
        return f"no CUDA graph was replayed: {graphs['declined']}"
    # Prompts never are.
    declined = {reason: n for reason, n in graphs["declined"].items() if reason != "prompts"}
    return f"steps of some cells were no CUDA graphs: {declined}" if declined else None


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The whole document, again and again as it grows.

    Raises BenchmarkError without CUDA, unless a CPU was asked for.
    """
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("there is no CUDA device; --device cpu --tiny tries the code without")
    shapes = [TINY] if arguments.tiny else _wanted(arguments.shape)
    tokens = 4 if arguments.tiny else 32
    setting = Setting(
        plan=TINY_PLAN if arguments.tiny else GPU_PLAN,
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        bandwidth=copy_bandwidth(device, 2**24 if arguments.tiny else 2**30),
        num_peer_tokens=0 if arguments.no_peers else tokens,
        compiled=arguments.compile,
        graphs=not arguments.no_graphs,
    )
    document: dict[str, Any] = {
        "machine": asdict(describe_machine()),
        "chip": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "dtype": str(setting.dtype),
        "compiled": setting.compiled,
        "graphs": setting.graphs,
        "copy_bandwidth_bytes_per_s": round(setting.bandwidth),
        "shapes": [],
    }
    # The larger model takes most of the time.
    weight = 60 * arguments.minutes / sum(shape.hidden_size for shape in shapes)
    for shape in shapes:
        found: dict[str, Any] = {"shape": asdict(shape)}
        document["shapes"].append(found)
        try:
            for part in measure_shape(shape, setting, weight * shape.hidden_size):
                found.update(part)
                yield document
        except Exception as error:  # memory or time that one shape lacks must not cost the others
            found["failed"] = str(error) if isinstance(error, _KNOWN) else repr(error)[:300]
        yield document  # after some errors a device does not even free its memory
        _free(device)


def _wanted(names: Sequence[str] | None) -> list[ModelShape]:
    return [shape for shape in SHAPES if not names or shape.name in names]


def failures(document: dict[str, Any]) -> list[str]:
    """What did not go as it should, by shape."""
    return [
        f"{found['shape']['name']}: {found[key]}"
        for found in document["shapes"]
        for key in ("failed", "without_graphs")
        if key in found
    ]


def print_tables(document: dict[str, Any]) -> None:
    """The cells of every shape, for people."""
    console = Console()
    for found in document["shapes"]:
        if "cells" not in found:
            continue
        limit = found["one_row_of_bandwidth_limit"]
        title = f"{found['shape']['name']} on {document['chip']}; 1 row at {limit} of its limit"
        cells = Table("", "rows", "ms a step", "ms of the host", "tok/s", "of base", title=title)
        for cell in found["cells"]:
            cells.add_row(*(str(value) for value in cell.values()))
        for peer in found.get("peers", ()):
            speed = str(peer.get("decode_tokens_per_s", peer.get("left_out")))
            cells.add_row(peer["peer"], str(peer["rows"]), "", "", speed, "")
        console.print(cells)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _parser() -> argparse.ArgumentParser:
    parser = command("gpu", __doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--tiny", action="store_true", help="toy sizes, to try the code")
    names = [shape.name for shape in SHAPES]
    sizes.add_argument("--shape", action="append", choices=names, help="of these alone; repeatable")
    parser.add_argument("--compile", action="store_true", help="as `serve --compile`")
    parser.add_argument("--no-peers", action="store_true", help="the engine alone")
    parser.add_argument("--no-graphs", action="store_true", help="steps are not captured")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--output", type=Path, help="written after every stage")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the JSON file; 1, with the reasons, if a part cannot be done."""
    arguments = _parser().parse_args(argv)
    document: dict[str, Any] = {"shapes": []}
    try:
        for document in measure(arguments):
            if arguments.output:
                write_json(document, arguments.output)
    except _KNOWN as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_tables(document)
    for failure in failures(document):
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures(document) else 0


def _show_log() -> None:
    logging.basicConfig(format="%(message)s")
    for package in _LOGGED:
        logging.getLogger(package).setLevel(logging.INFO)


if __name__ == "__main__":
    _show_log()
    sys.exit(main())
