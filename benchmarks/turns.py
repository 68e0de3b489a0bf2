"""Engines that take turns step by step: kinds of traffic, or versions of the code.

What runs one after the other differs by 10% on many machines, whatever it is. Here each side is a
process of its own with the engine in it, without HTTP; all serve the same requests, in a closed
loop, and for each step of one there is the same step of every other right beside it.

    python -m benchmarks.turns 0 1 8                  # base, one adapter, eight, in turns
    python -m benchmarks.turns ../before:8 8          # another checkout beside this one
    python -m benchmarks.turns --product bf16 --mode auto 0 1
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.command import command, write_json
from benchmarks.machine import describe_machine
from dynamic_lora_adapters.threads import spin_briefly

Step = dict[str, Any]  # what a side says of one: `s`, `tokens`, and whether there is `more`

_HERE = Path(__file__).resolve().parent
_SOURCES = ("adapters", "server", "clients")
# A team of threads that has nothing to do goes on spinning for a while: the next side waits for
# that to end.
_PAUSE_S = 0.002
_PASSED_ON = (
    "model",
    "product",
    "mode",
    "clients",
    "rank",
    "saved_in",
    "prompt_tokens",
    "output_tokens",
)


@dataclass(frozen=True, slots=True)
class Traffic:
    """A side as it is named on the command line."""

    checkout: Path
    adapters: int

    @classmethod
    def parse(cls, text: str) -> "Traffic":
        """From `[CHECKOUT:]ADAPTERS`. Raises argparse.ArgumentTypeError."""
        place, _, count = text.rpartition(":")
        checkout = Path(place or _HERE.parent).resolve()
        if not count.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} does not end with a number of adapters")
        for source in _SOURCES:
            if not (checkout / source).is_dir():
                raise argparse.ArgumentTypeError(f"{checkout} has no folder {source!r}")
        return cls(checkout, int(count))

    def __str__(self) -> str:
        own = self.checkout == _HERE.parent
        return f"{self.adapters}" if own else f"{self.checkout.name}:{self.adapters}"


@dataclass(frozen=True, slots=True)
class Round:
    """What one side did in one round. `paired` is the median, over its steps, of the time that the
    first side's step took by what its own took beside it."""

    side: str
    steps: int
    tokens_per_s: float
    median_step_ms: float
    of_first: float
    paired: float


class SideProcess:
    """A side in a process of its own, until the context ends."""

    def __init__(self, traffic: Traffic, options: argparse.Namespace) -> None:
        given = {name: getattr(options, name) for name in _PASSED_ON}
        given["adapters"] = traffic.adapters
        flags = [
            f"--{name.replace('_', '-')}={value}"
            for name, value in given.items()
            if value is not None
        ]
        sources = os.pathsep.join(str(traffic.checkout / source) for source in _SOURCES)
        environment = {**os.environ, "PYTHONPATH": sources}
        spin_briefly(environment)  # as the server does
        # Without -P the modules of this folder would be importable as top-level ones.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_HERE / "turns_side.py"), *flags],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "SideProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, **question: int) -> Step:
        """The answer to a question. Raises RuntimeError if the process has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Step:
        """The next line that the process says. Raises RuntimeError if it has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"A side ended with exit status {self._process.wait()}.")
        answer: Step = json.loads(line)
        return answer


def take_turns(
    sides: Sequence[SideProcess], seed: int, requests: int
) -> list[list[dict[str, Any]]]:
    """All steps of a round, by side. Every second time the order is the other way round."""
    for side in sides:
        side.ask(begin=seed, requests=requests)
    steps: list[list[Step]] = [[] for _ in sides]
    more, forward = True, True
    while more:
        numbers = range(len(sides))
        for number in numbers if forward else reversed(numbers):
            steps[number].append(sides[number].ask())
            time.sleep(_PAUSE_S)
        forward = not forward
        counts = {side[-1]["tokens"] for side in steps}
        if len(counts) > 1:
            raise RuntimeError(f"The sides are out of step: one made {counts} tokens in a step.")
        more = steps[0][-1]["more"]
    return steps


def summed_up(names: Sequence[str], steps: list[list[Step]]) -> list[Round]:
    """What each side did, and how it compares with the first."""
    seconds = [[step["s"] for step in side] for side in steps]
    tokens = sum(step["tokens"] for step in steps[0])
    return [
        Round(
            side=name,
            steps=len(own),
            tokens_per_s=tokens / sum(own),
            median_step_ms=statistics.median(own) * 1e3,
            of_first=sum(seconds[0]) / sum(own),
            paired=statistics.median(a / b for a, b in zip(seconds[0], own, strict=True)),
        )
        for name, own in zip(names, seconds, strict=True)
    ]


def distinct(names: Sequence[str]) -> list[str]:
    """The same names, with a number behind those that were there before."""
    return [
        f"{name} ({names[:place].count(name) + 1})" if name in names[:place] else name
        for place, name in enumerate(names)
    ]


def measure(options: argparse.Namespace) -> list[Round]:
    """All rounds, after a short one that is not counted."""
    names = distinct([str(traffic) for traffic in options.sides])
    rounds: list[Round] = []
    with ExitStack() as stack:
        sides = []
        for traffic in options.sides:
            sides.append(stack.enter_context(SideProcess(traffic, options)))
            sides[-1].answer()  # it is ready: what it measures at its start nobody else disturbs
        take_turns(sides, 0, options.clients)
        for seed in track(range(1, options.rounds + 1), "Rounds"):
            rounds += summed_up(names, take_turns(sides, seed, options.requests))
    return rounds


def table(rounds: Sequence[Round]) -> Table:
    """A line for each side: medians of its rounds, and the rates of each of the first side's."""
    result = Table("side", "tok/s", "ms a step", "of the first", "its rounds", "step by step")
    for name in dict.fromkeys(each.side for each in rounds):
        own = [each for each in rounds if each.side == name]

        def middle(value: str, own: Sequence[Round] = own) -> float:
            return float(statistics.median(getattr(each, value) for each in own))

        result.add_row(
            name,
            f"{middle('tokens_per_s'):.0f}",
            f"{middle('median_step_ms'):.1f}",
            f"{middle('of_first'):.3f}",
            ", ".join(f"{each.of_first:.3f}" for each in own),
            f"{middle('paired'):.3f}",
        )
    return result


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = command("turns", __doc__)
    root.add_argument(
        "sides",
        nargs="+",
        type=Traffic.parse,
        metavar="[CHECKOUT:]ADAPTERS",
        help="how many adapters are asked for in turns; 0: the base model",
    )
    root.add_argument("--model", help="folder of a base model (default: the server's)")
    root.add_argument("--product", help="plain, packed, native, bf16 or int8 (default: measured)")
    root.add_argument("--mode", default="bypass", help="bypass, merged or auto")
    for name, number, text in (
        ("clients", 32, "requests at a time"),
        ("requests", 128, "requests of a round"),
        ("rounds", 3, "rounds"),
        ("rank", 16, "rank of the adapters"),
        ("prompt-tokens", 64, "length of prompts"),
        ("output-tokens", 64, "length of answers"),
    ):
        root.add_argument(f"--{name}", type=int, default=number, help=f"{text} (%(default)s)")
    root.add_argument(
        "--saved-in",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype that the adapters' numbers come from (%(default)s)",
    )
    root.add_argument("--output", type=Path, help="a JSON file to write")
    return root


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    options = parser().parse_args(argv)
    rounds = measure(options)
    Console().print(table(rounds))
    if options.output is not None:
        settings = {name: getattr(options, name) for name in _PASSED_ON}
        report = {
            "machine": asdict(describe_machine()),
            "settings": settings,
            "rounds": [asdict(each) for each in rounds],
        }
        write_json(report, options.output)


if __name__ == "__main__":
    main()
