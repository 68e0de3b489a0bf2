"""What drafted tokens bring on real tasks, through the running server.

    python -m benchmarks.speculation --data DIR
    python -m benchmarks.speculation --data DIR --flags "--quantize int8" --output FILE
    python -m benchmarks.speculation --data DIR --parameters '{"repetition_penalty": 1.1}'

The shipped adapters answer the dev splits of their data sets (under the paths that
`recipes/*.yaml` name below `DIR`), streaming, with drafts and with `--speculate 0`. In each round
both servers are started anew, one after the other, so that neither has seen anything; the first
requests are not counted, and no prompt comes twice in a round. Every second round goes the other
way about. The answers of the two are held against each other.
"""

import argparse
import asyncio
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.command import command, exit_with_reason, say, write_json
from benchmarks.errors import RequestFailed
from benchmarks.load import connect, events_of
from benchmarks.machine import describe_machine
from benchmarks.peers.dynamic_lora import serving, totals
from benchmarks.peers.process import end_on_sigterm
from benchmarks.stats import percentile
from benchmarks.tasks import TASKS, dev_prompts
from dynamic_lora_server.base.base_model import DEFAULT_BASE
from dynamic_lora_server.training.errors import TrainingError

NUM_CLIENTS = (1, 8, 32)
_COUNTERS = ("engine_steps", "drafted_tokens", "accepted_draft_tokens")
_WARM_SHARE = 0.2
# Of what is left, what each number of clients asks for; more clients need more to be busy.
_SHARES = (0.15, 0.35, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One task by so many clients on one server; `answers` are the texts, by prompt."""

    task: str
    num_clients: int
    num_tokens: int
    wall_s: float
    num_steps: int
    num_drafted: int
    num_accepted: int
    answers: dict[str, str]

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all requests over the time that they took together."""
        return self.num_tokens / self.wall_s


def slices(prompts: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """What warms a server up, and what each of `NUM_CLIENTS` asks for: nothing twice."""
    num_warm = round(len(prompts) * _WARM_SHARE)
    warm, rest = list(prompts[:num_warm]), list(prompts[num_warm:])
    parts, begin = [], 0
    for share in _SHARES:
        end = min(begin + round(share * len(rest)), len(rest))
        parts.append(rest[begin:end])
        begin = end
    return warm, parts


async def ask(
    http: aiohttp.ClientSession, task: str, prompt: str, parameters: Mapping[str, Any]
) -> tuple[str, int]:
    """The answer to one prompt, and its tokens. Raises RequestFailed."""
    text, num_tokens = None, 0
    body = {"inputs": prompt, "parameters": parameters}
    async with http.post("/generate_stream", params={"adapter": task}, json=body) as response:
        async for event in events_of(response):
            num_tokens += 1
            text = event.get("generated_text")
    if text is None:
        raise RequestFailed("the stream ended without a text")
    return text, num_tokens


async def measure(
    http: aiohttp.ClientSession,
    task: str,
    prompts: Sequence[str],
    num_clients: int,
    parameters: Mapping[str, Any],
) -> Cell:
    """All prompts from so many clients, each with one under way. Raises RequestFailed."""
    waiting = iter(prompts)
    answers: dict[str, str] = {}
    num_tokens = 0

    async def client() -> None:
        nonlocal num_tokens
        for prompt in waiting:
            answers[prompt], count = await ask(http, task, prompt, parameters)
            num_tokens += count

    before = await totals(http, *_COUNTERS)
    loop = asyncio.get_running_loop()
    begin = loop.time()
    await asyncio.gather(*(client() for _ in range(num_clients)))
    wall_s = loop.time() - begin
    after = await totals(http, *_COUNTERS)
    steps, drafted, accepted = (int(b - a) for a, b in zip(before, after, strict=True))
    return Cell(
        task=task,
        num_clients=num_clients,
        num_tokens=num_tokens,
        wall_s=wall_s,
        num_steps=steps,
        num_drafted=drafted,
        num_accepted=accepted,
        answers=answers,
    )


async def measure_all(
    url: str, prompts: dict[str, list[str]], parameters: Mapping[str, Any]
) -> list[Cell]:
    """Every task by every number of clients on a server that was just started."""
    cells = []
    async with connect(url) as http:
        for task, own in prompts.items():
            warm, parts = slices(own)
            await measure(http, task, warm, max(NUM_CLIENTS), parameters)
            for num_clients, part in zip(NUM_CLIENTS, parts, strict=True):
                cells.append(await measure(http, task, part, num_clients, parameters))
    return cells


def rounds(
    folder: Path, options: argparse.Namespace, prompts: dict[str, list[str]]
) -> Iterator[dict[str, list[Cell]]]:
    """The cells of each round, by `plain` and `drafting`."""
    own = tuple(options.flags.split())
    drafted = {"plain": 0, "drafting": options.speculate}
    flags = {side: (*own, "--speculate", str(most)) for side, most in drafted.items()}
    for number in range(options.rounds):
        found = {}
        for side in sorted(flags, reverse=number % 2 == 0):
            with serving(None, folder / side, folder / f"{side}.log", flags[side]) as (url, _):
                found[side] = asyncio.run(measure_all(url, prompts, options.parameters))
        yield found


def summary(measured: Sequence[dict[str, list[Cell]]]) -> list[dict[str, Any]]:
    """One document for each task and number of clients: medians, and the ratio of each round."""
    documents = []
    for place, first in enumerate(measured[0]["plain"]):
        plain = [found["plain"][place] for found in measured]
        drafting = [found["drafting"][place] for found in measured]
        ratios = [d.tokens_per_s / p.tokens_per_s for d, p in zip(drafting, plain, strict=True)]
        pairs = zip(drafting, plain, strict=True)
        documents.append(
            {
                "task": first.task,
                "num_clients": first.num_clients,
                "plain_tokens_per_s": percentile([cell.tokens_per_s for cell in plain], 50),
                "drafting_tokens_per_s": percentile([cell.tokens_per_s for cell in drafting], 50),
                "ratio": percentile(ratios, 50),
                "ratios": ratios,
                "tokens_per_step": [cell.num_tokens / cell.num_steps for cell in drafting],
                "plain_tokens_per_step": [cell.num_tokens / cell.num_steps for cell in plain],
                "share_accepted": [c.num_accepted / max(c.num_drafted, 1) for c in drafting],
                "num_answers": len(first.answers),
                "num_answers_that_differ": [
                    sum(d.answers[prompt] != text for prompt, text in p.answers.items())
                    for d, p in pairs
                ],
            }
        )
    return documents


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = command("speculation", __doc__)
    root.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    root.add_argument("--speculate", type=int, default=7, help="tokens drafted at most")
    root.add_argument("--flags", default="", help="further options of both servers")
    root.add_argument("--parameters", type=json.loads, default={}, help="of every request, as JSON")
    root.add_argument("--task", choices=TASKS, action="append", help="these alone (repeatable)")
    root.add_argument("--limit", type=int, default=400, help="prompts of a task at most")
    root.add_argument("--rounds", type=int, default=2)
    root.add_argument("--output", type=Path, help="JSON file (default: standard output)")
    return root


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print one line for each cell, write the JSON."""
    options = parser().parse_args(argv)
    with exit_with_reason("speculation", TrainingError):
        prompts = {
            task: dev_prompts(task, options.data)[: options.limit] for task in options.task or TASKS
        }
    end_on_sigterm()
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    with exit_with_reason("speculation"), tempfile.TemporaryDirectory() as scratch:
        measured = list(rounds(Path(scratch), options, prompts))
    cells = summary(measured)
    for cell in cells:
        say(
            f"{cell['task']}, {cell['num_clients']} clients: {cell['plain_tokens_per_s']:.1f} and "
            f"{cell['drafting_tokens_per_s']:.1f} tok/s, {cell['ratio']:.2f}x"
        )
    document = {
        "machine": asdict(describe_machine()),
        "base": DEFAULT_BASE,
        "started_at": started_at,
        "flags": options.flags,
        "parameters": options.parameters,
        "speculate": options.speculate,
        "cells": cells,
    }
    write_json(document, options.output)


if __name__ == "__main__":
    main()
