"""Time to first token with and without a known prompt prefix, through the running server.

    python -m benchmarks.prefix
    python -m benchmarks.prefix --base FOLDER --output benchmarks/results/prefix-MACHINE.json

One client asks with a template of random words that the server has never seen (cold),
then with the same template and other questions (warm), for the base and for an adapter.
"""

import argparse
import asyncio
import random
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.command import command, exit_with_reason, say, write_json
from benchmarks.load import connect, send_streaming
from benchmarks.machine import describe_machine
from benchmarks.peers.adapters import make_adapters
from benchmarks.peers.dynamic_lora import serving, upload
from benchmarks.peers.process import end_on_sigterm
from benchmarks.stats import percentile
from benchmarks.wire import DynamicLoraWire
from benchmarks.workload import PromptMaker, Request

_NUM_OUTPUT_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixCell:
    """The times to first token, in seconds, that one adapter (or the base) was answered in."""

    served: str
    cold_s: list[float]
    warm_s: list[float]

    @property
    def ratio(self) -> float:
        """How many times sooner the median warm request has its first token."""
        return percentile(self.cold_s, 50) / percentile(self.warm_s, 50)

    def document(self) -> dict[str, Any]:
        """The times with their medians and the ratio, for the JSON file."""
        medians = {
            "cold_p50_s": percentile(self.cold_s, 50),
            "warm_p50_s": percentile(self.warm_s, 50),
        }
        return {**asdict(self), **medians, "ratio": self.ratio}


def prompts(
    templates: PromptMaker, questions: PromptMaker, rng: random.Random, *, num_warm: int
) -> Iterator[str]:
    """One new template with `num_warm + 1` different questions behind it."""
    template = templates.make(rng)
    for _ in range(num_warm + 1):
        yield f"{template} {questions.make(rng)}"


async def measure(
    ttft: Callable[[str, int | None], Awaitable[float]],
    new_prompts: Callable[[], Iterator[str]],
    *,
    names: list[str],
    num_trials: int,
) -> list[PrefixCell]:
    """The cells of the base and of each adapter; their trials take turns.

    `ttft` asks for a prompt with the adapter of that index and returns the seconds to its
    first token; of each of `new_prompts`, the first is cold.
    """
    served: list[int | None] = [None, *range(len(names))]
    cells = {
        adapter: PrefixCell(
            served="base" if adapter is None else names[adapter], cold_s=[], warm_s=[]
        )
        for adapter in served
    }
    for _ in range(num_trials):
        for adapter in served:
            for number, prompt in enumerate(new_prompts()):
                cell = cells[adapter]
                (cell.warm_s if number else cell.cold_s).append(await ttft(prompt, adapter))
    return list(cells.values())


async def run(
    options: argparse.Namespace, base: Path, url: str, names: list[str]
) -> list[PrefixCell]:
    """Warm the server up and measure it. Raises BenchmarkError."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    templates = PromptMaker(tokenizer, options.template_tokens)
    questions = PromptMaker(tokenizer, options.question_tokens)
    rng = random.Random(options.seed)
    wire = DynamicLoraWire(names)
    async with connect(url) as http:

        async def ttft(prompt: str, adapter: int | None) -> float:
            request = Request(prompt=prompt, adapter=adapter, num_output_tokens=_NUM_OUTPUT_TOKENS)
            return (await send_streaming(http, wire, request)).ttft

        def new_prompts() -> Iterator[str]:
            return prompts(templates, questions, rng, num_warm=options.warm)

        await measure(ttft, new_prompts, names=names, num_trials=1)
        return await measure(ttft, new_prompts, names=names, num_trials=options.trials)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = command("prefix", __doc__)
    root.add_argument("--base", help="base model: folder or Hub id (default: the embedded one)")
    root.add_argument("--template-tokens", type=int, default=512)
    root.add_argument("--question-tokens", type=int, default=16)
    root.add_argument("--trials", type=int, default=5, help="new templates for each adapter")
    root.add_argument("--warm", type=int, default=2, help="warm requests for each template")
    root.add_argument("--dtype", default="float32")
    root.add_argument("--seed", type=int, default=0)
    root.add_argument("--output", type=Path, help="JSON file (default: standard output)")
    return root


def main() -> None:
    """Start a server, measure, print one line for each cell, write the JSON."""
    from dynamic_lora_server.base.base_model import resolve_base

    options = parser().parse_args()
    end_on_sigterm()
    base = resolve_base(options.base)
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        adapters = make_adapters(base.path, folder / "adapters", num_adapters=1)
        flags = ("--dtype", options.dtype)
        with (
            exit_with_reason("prefix"),
            serving(base.path, folder / "home", folder / "server.log", flags) as (url, _),
        ):
            cells = asyncio.run(run(options, base.path, url, upload(url, adapters)))
    for cell in cells:
        cold, warm = percentile(cell.cold_s, 50) * 1e3, percentile(cell.warm_s, 50) * 1e3
        say(f"{cell.served}: cold {cold:.0f} ms, warm {warm:.0f} ms, {cell.ratio:.1f}x")
    document = {
        "machine": asdict(describe_machine()),
        "base": base.name,
        "started_at": started_at,
        "dtype": options.dtype,
        "num_template_tokens": options.template_tokens,
        "num_question_tokens": options.question_tokens,
        "cells": [cell.document() for cell in cells],
    }
    write_json(document, options.output)


if __name__ == "__main__":
    main()
