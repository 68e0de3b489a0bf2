"""Engines that take turns step by step: kinds of traffic, or versions of the code.

What runs one after the other differs by 10% on many machines, whatever it is. Here each side is a
process of its own with the engine in it, without HTTP; all serve the same requests, in a closed
loop, and the side that has made the fewest tokens makes the next step. So for each step of one
there is the same step of every other right beside it, or, with drafts, the same part of the work.

    python -m benchmarks.turns 0 1 8                  # base, one adapter, eight, in turns
    python -m benchmarks.turns ../before:8 8          # another checkout beside this one
    python -m benchmarks.turns --product bf16 --mode auto 0 1
    python -m benchmarks.turns --data DIR ner ner+7   # a task, without and with drafts
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.command import command, exit_with_reason, write_json
from benchmarks.errors import BenchmarkError
from benchmarks.machine import describe_machine
from benchmarks.tasks import TASKS, dev_prompts
from dynamic_lora_adapters.threads import spin_briefly
from dynamic_lora_server.training.errors import TrainingError

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
    """A side as it is named on the command line: so many random adapters, or the one of a task."""

    checkout: Path
    asked_for: int | str
    drafted: int = 0

    @classmethod
    def parse(cls, text: str) -> "Traffic":
        """From `[CHECKOUT:]ADAPTERS[+DRAFTED]`. Raises argparse.ArgumentTypeError."""
        place, _, traffic = text.rpartition(":")
        adapters, _, drafted = traffic.partition("+")
        checkout = Path(place or _HERE.parent).resolve()
        if not adapters.isdecimal() and adapters not in TASKS:
            raise argparse.ArgumentTypeError(
                f"{text!r} names neither a number of adapters nor one of {', '.join(TASKS)}"
            )
        if not (drafted or "0").isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} ends with no number of drafted tokens")
        for source in _SOURCES:
            if not (checkout / source).is_dir():
                raise argparse.ArgumentTypeError(f"{checkout} has no folder {source!r}")
        return cls(checkout, int(adapters) if adapters.isdecimal() else adapters, int(drafted or 0))

    @property
    def task(self) -> str | None:
        """Whose dev prompts are asked; None: random ones."""
        return None if isinstance(self.asked_for, int) else self.asked_for

    def __str__(self) -> str:
        place = "" if self.checkout == _HERE.parent else f"{self.checkout.name}:"
        return f"{place}{self.asked_for}" + (f"+{self.drafted}" if self.drafted else "")


@dataclass(frozen=True, slots=True)
class Round:
    """What one side did in one round. `of_first` is its rate by the first side's. `paired` is the
    median, over its steps, of the time that the first side's step took by what its own took beside
    it; None where the two made different numbers of steps."""

    side: str
    steps: int
    tokens: int
    tokens_per_s: float
    median_step_ms: float
    of_first: float
    paired: float | None


class SideProcess:
    """A side in a process of its own, until the context ends."""

    def __init__(self, traffic: Traffic, options: argparse.Namespace) -> None:
        given = {name: getattr(options, name) for name in _PASSED_ON}
        given["adapters"] = 0 if traffic.task else traffic.asked_for
        given["task"] = traffic.task
        given["speculate"] = traffic.drafted or None  # older checkouts know no drafts
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

    def ask(self, **question: int | Sequence[str]) -> Step:
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
    sides: Sequence[SideProcess], begin: Mapping[str, int | Sequence[str]]
) -> list[list[Step]]:
    """All steps of a round, by side. Who has made the fewest tokens is next; of equal ones the
    first, and the last once all have made the same."""
    for side in sides:
        side.ask(**begin)
    steps: list[list[Step]] = [[] for _ in sides]
    made = [0] * len(sides)
    waiting = list(range(len(sides)))
    while waiting:
        number = min(waiting, key=made.__getitem__)
        step = sides[number].ask()
        steps[number].append(step)
        made[number] += step["tokens"]
        if not step["more"]:
            waiting.remove(number)
        if len(set(made)) == 1:
            waiting.reverse()
        time.sleep(_PAUSE_S)
    return steps


def summed_up(names: Sequence[str], steps: Sequence[Sequence[Step]]) -> list[Round]:
    """What each side did, and how it compares with the first."""
    first = [step["s"] for step in steps[0]]
    rate = _tokens(steps[0]) / sum(first)
    rounds = []
    for name, side in zip(names, steps, strict=True):
        own = [step["s"] for step in side]
        pairs = list(zip(first, own, strict=True)) if len(own) == len(first) else []
        rounds.append(
            Round(
                side=name,
                steps=len(own),
                tokens=_tokens(side),
                tokens_per_s=_tokens(side) / sum(own),
                median_step_ms=statistics.median(own) * 1e3,
                of_first=_tokens(side) / sum(own) / rate,
                paired=statistics.median(a / b for a, b in pairs) if pairs else None,
            )
        )
    return rounds


def _tokens(steps: Sequence[Step]) -> int:
    return sum(step["tokens"] for step in steps)


def distinct(names: Sequence[str]) -> list[str]:
    """The same names, with a number behind those that were there before."""
    return [
        f"{name} ({names[:place].count(name) + 1})" if name in names[:place] else name
        for place, name in enumerate(names)
    ]


def measure(options: argparse.Namespace) -> list[Round]:
    """All rounds, after one that is not counted. Raises BenchmarkError as `questions` does."""
    names = distinct([str(traffic) for traffic in options.sides])
    asked = questions(options)
    rounds: list[Round] = []
    with ExitStack() as stack:
        sides = []
        for traffic in options.sides:
            sides.append(stack.enter_context(SideProcess(traffic, options)))
            sides[-1].answer()  # it is ready: what it measures at its start nobody else disturbs
        take_turns(sides, asked[0])
        for begin in track(asked[1:], "Rounds"):
            rounds += summed_up(names, take_turns(sides, begin))
    return rounds


def questions(options: argparse.Namespace) -> list[dict[str, int | Sequence[str]]]:
    """How sides are told to begin: the round that is not counted, then the others.

    Raises BenchmarkError if sides are asked for different things, or there are too few dev prompts.
    """
    tasks = {traffic.task for traffic in options.sides}
    if len(tasks) > 1:
        raise BenchmarkError("sides of different tasks, or of a task and none, cannot be compared")
    requests, numbers = options.requests, range(options.rounds + 1)
    task = tasks.pop()
    if task is None:
        return [
            {"begin": seed, "requests": requests if seed else options.clients} for seed in numbers
        ]
    if options.data is None:
        raise BenchmarkError(f"{task} needs --data, the folder with the data sets")
    prompts = dev_prompts(task, options.data)
    if len(prompts) < len(numbers) * requests:
        raise BenchmarkError(
            f"{task} has {len(prompts)} dev prompts, and {len(numbers)} rounds (one is not "
            f"counted) of {requests} requests need {len(numbers) * requests}"
        )
    return [
        {
            "begin": seed,
            "requests": requests,
            "prompts": prompts[seed * requests : (seed + 1) * requests],
        }
        for seed in numbers
    ]


def table(rounds: Sequence[Round]) -> Table:
    """A line for each side: medians of its rounds, and the rates of each of the first side's."""
    result = Table("side", "tok/s", "ms a step", "of the first", "its rounds", "step by step")
    for name in dict.fromkeys(each.side for each in rounds):
        own = [each for each in rounds if each.side == name]

        def middle(value: str, own: Sequence[Round] = own) -> float:
            return float(statistics.median(getattr(each, value) for each in own))

        paired = all(each.paired is not None for each in own)
        result.add_row(
            name,
            f"{middle('tokens_per_s'):.0f}",
            f"{middle('median_step_ms'):.1f}",
            f"{middle('of_first'):.3f}",
            ", ".join(f"{each.of_first:.3f}" for each in own),
            f"{middle('paired'):.3f}" if paired else "",
        )
    return result


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = command("turns", __doc__)
    root.add_argument(
        "sides",
        nargs="+",
        type=Traffic.parse,
        metavar="[CHECKOUT:]ADAPTERS[+DRAFTED]",
        help="how many random adapters are asked for in turns (0: the base model), or the shipped "
        f"one that answers the dev prompts of its data ({', '.join(TASKS)}); and how many tokens "
        "are drafted at most",
    )
    root.add_argument("--model", help="folder of a base model (default: the server's)")
    root.add_argument("--product", help="plain, packed, native, bf16, int8, w8a8; else measured")
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
    root.add_argument("--data", type=Path, help="folder with the data sets, for tasks")
    root.add_argument("--output", type=Path, help="a JSON file to write")
    return root


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    options = parser().parse_args(argv)
    with exit_with_reason("turns", TrainingError):
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
