"""What the commands of this folder share: how they read options, speak, fail and keep results."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError

RESULTS = Path(__file__).parent / "results"


def command(name: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of `python -m benchmarks.NAME`, without options yet."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def counts(text: str) -> list[int]:
    """An option such as `1,8,32`. Raises ValueError."""
    return [int(word) for word in text.split(",")]


@contextmanager
def exit_with_reason(name: str, *others: type[Exception]) -> Iterator[None]:
    """Have a BenchmarkError, or one of the `others`, end the command NAME with 1 and its text."""
    expected: tuple[type[Exception], ...] = (BenchmarkError, *others)
    try:
        yield
    except expected as error:
        raise SystemExit(f"benchmarks.{name}: {error}") from error


def say(text: str) -> None:
    """A line on standard error, at once."""
    print(text, file=sys.stderr, flush=True)


def write_json(document: Any, path: Path | None) -> None:
    """Write a file, never half of it, in a folder that may be missing; None: standard output."""
    text = json.dumps(document, indent=2) + "\n"
    if path is None:
        print(text, end="")
        return
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")  # a device, such as /dev/null: not to be replaced
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
