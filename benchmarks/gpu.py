"""What adapters cost on a GPU: steps of base, idle, merged and mixed bypass, in one run.

Models have the shapes of a Llama of 1B and of 8B parameters and random weights
in bfloat16; adapters have rank 16 on every linear layer. Cells take turns,
round by round; figures are medians over rounds, ratios are taken within a
round. Ends within `--minutes`: what finds no time is left out by name.

    python -m benchmarks.gpu --output benchmarks/results/gpu.json
    python -m benchmarks.gpu --compile --output benchmarks/results/gpu-compiled.json

`--device cpu --tiny` runs the same code on a model of toy size.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.errors import BenchmarkError
from benchmarks.gpu_engine import Plan, StepBench, table
from benchmarks.gpu_peers import measure_peers
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
PEER_ROWS = (1, 8, 32)
# Of a shape's time the engine may take so much; the rest is for the peers.
_ENGINE_SHARE = 0.75


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes per second read and written by copies of `num_bytes`, the median of ten."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(11):
        _synchronise(device)
        begin = time.perf_counter()
        target.copy_(source)
        _synchronise(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * num_bytes / statistics.median(seconds[1:])


def measure_shape(
    shape: ModelShape,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    *,
    bandwidth: float,
    seconds: float,
    num_peer_tokens: int,
    compiled: bool,
) -> dict[str, Any]:
    """All figures of one shape, within `seconds` or a round more."""
    begin = time.monotonic()

    def spent(share: float) -> Callable[[], bool]:
        return lambda: time.monotonic() - begin > share * seconds

    bench = StepBench(shape, plan, device, dtype, compiled=compiled)
    rounds = []
    for found in bench.rounds():
        rounds.append(found)
        if spent(_ENGINE_SHARE)():
            break
    kernels, graphs = bench.kernel_table(), bench.graphs()
    weight_bytes = bench.weight_bytes
    del bench
    _free(device)
    cells = table(rounds)
    step_s = next(c["step_ms"] / 1e3 for c in cells if (c["cell"], c["rows"]) == ("base", 1))
    peer_rows = tuple(rows for rows in PEER_ROWS if rows <= max(plan.rows))
    peers = measure_peers(
        shape,
        device,
        dtype,
        rows=peer_rows,
        num_tokens=num_peer_tokens,
        out_of_time=spent(1.0),
    )
    _free(device)
    return {
        "shape": asdict(shape),
        "num_rounds": len(rounds),
        "weight_bytes": weight_bytes,
        "one_row_of_bandwidth_limit": round(weight_bytes / bandwidth / step_s, 4),
        "cells": cells,
        "graphs": graphs,
        "kernels_us": kernels,
        "peers": peers,
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole document. Raises BenchmarkError without CUDA, unless a CPU was asked for."""
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("there is no CUDA device; --device cpu --tiny tries the code without")
    shapes = [TINY] if arguments.tiny else [LLAMA_1B, LLAMA_8B]
    plan = TINY_PLAN if arguments.tiny else GPU_PLAN
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bandwidth = copy_bandwidth(device, 2**24 if arguments.tiny else 2**30)
    # The larger model takes most of the time.
    weights = [shape.hidden_size for shape in shapes]
    return {
        "machine": asdict(describe_machine()),
        "chip": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "dtype": str(dtype),
        "compiled": arguments.compile,
        "copy_bandwidth_bytes_per_s": round(bandwidth),
        "shapes": [
            measure_shape(
                shape,
                plan,
                device,
                dtype,
                bandwidth=bandwidth,
                seconds=arguments.minutes * 60 * weight / sum(weights),
                num_peer_tokens=4 if arguments.tiny else 32,
                compiled=arguments.compile,
            )
            for shape, weight in zip(shapes, weights, strict=True)
        ],
    }


def print_tables(document: dict[str, Any]) -> None:
    """The cells of every shape, for people."""
    console = Console()
    for found in document["shapes"]:
        limit = found["one_row_of_bandwidth_limit"]
        title = f"{found['shape']['name']} on {document['chip']}; 1 row at {limit} of its limit"
        cells = Table("", "rows", "ms a step", "tok/s", "of base", title=title)
        for cell in found["cells"]:
            cells.add_row(*(str(value) for value in cell.values()))
        for peer in found["peers"]:
            speed = str(peer.get("tokens_per_s", peer.get("left_out")))
            cells.add_row(peer["peer"], str(peer["rows"]), "", speed, "")
        console.print(cells)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the JSON file; 1, with the reason, if it cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the code")
    parser.add_argument("--compile", action="store_true", help="as `serve --compile`")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    try:
        document = measure(arguments)
    except (BenchmarkError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_tables(document)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
