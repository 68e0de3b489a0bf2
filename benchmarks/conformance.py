"""The conformance table: every kind of adapter on every architecture, against PEFT.

    python -m benchmarks.conformance [--write] [--kinds TEXT] [--architectures TEXT]

`--write` puts the whole table into `docs/conformance.md`; without it, the page
of the chosen rows and columns is printed, with the differences of this run.
Ends with status 1 where an answer is wrong.
"""

import argparse
import itertools
import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from benchmarks.command import command, say
from tests.support.conformance.architectures import ARCHITECTURES
from tests.support.conformance.bench import MODES
from tests.support.conformance.cells import Status, Table, measure_column
from tests.support.conformance.kinds import KINDS
from tests.support.conformance.page import render

PAGE = Path(__file__).resolve().parent.parent / "docs" / "conformance.md"


def measure(kinds: Sequence[str], architectures: Sequence[str]) -> Table:
    """The cells of the chosen rows and columns, a process for each of the processor's cores.

    A progress bar on standard error counts the columns.
    """
    table: Table = {}
    bar = Progress(
        *Progress.get_default_columns(), TimeElapsedColumn(), console=Console(stderr=True)
    )
    pool = ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))
    with bar, pool, tempfile.TemporaryDirectory() as folder:
        running = {pool.submit(_column, a, kinds, Path(folder)): a for a in architectures}
        task = bar.add_task("measuring", total=len(running))
        for column in as_completed(running):
            table |= column.result()
            bar.update(task, advance=1, description=f"{running[column]} is done")
    return _in_order(table, kinds, architectures)


def _column(architecture: str, kinds: Sequence[str], home: Path) -> Table:
    torch.set_num_threads(1)  # the models are tiny
    table: Table = {}
    for _, cells in measure_column(architecture, kinds, home):
        table |= cells
    return table


def _in_order(table: Table, kinds: Sequence[str], architectures: Sequence[str]) -> Table:
    keys = itertools.product(MODES, kinds, architectures)
    return {(mode, kind, column): table[mode, kind, column] for mode, kind, column in keys}


def _chosen(names: Sequence[str], wanted: str | None) -> list[str]:
    """The names that hold one of the comma-separated texts."""
    if wanted is None:
        return list(names)
    texts = [text.strip().lower() for text in wanted.split(",")]
    return [name for name in names if any(text in name.lower() for text in texts)]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = command("conformance", __doc__)
    root.add_argument("--write", action="store_true", help=f"write docs/{PAGE.name}")
    root.add_argument("--kinds", help="rows whose name holds one of these, comma-separated")
    root.add_argument("--architectures", help="columns, chosen in the same way")
    return root


def main() -> None:
    """Measure, then print or write the page."""
    options = parser().parse_args()
    kinds = _chosen(list(KINDS), options.kinds)
    architectures = _chosen(list(ARCHITECTURES), options.architectures)
    if options.write and (options.kinds or options.architectures):
        raise SystemExit("benchmarks.conformance: --write is for the whole table.")
    if not kinds or not architectures:
        raise SystemExit("benchmarks.conformance: no row or no column has such a name.")
    table = measure(kinds, architectures)
    if options.write:
        PAGE.write_text(render(table), encoding="utf-8")
    else:
        print(render(table, digits=True))
    wrong = [key for key, cell in table.items() if cell.status is Status.WRONG]
    for mode, kind, architecture in wrong:
        say(f"wrong: {kind} on {architecture}, {mode}")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
