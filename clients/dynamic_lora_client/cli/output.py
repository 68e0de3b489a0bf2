"""What the command writes: results on stdout, everything else on stderr."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dynamic_lora_client.cli.exit_codes import ExitCode, exit_code
from dynamic_lora_client.errors import ApiError, DynamicLoraError
from dynamic_lora_client.types import Adapter, Composition, UnreadableAdapter

# Where no terminal sets a width, none does: rich cuts the cells of a wider table.
_PIPE_WIDTH = sys.maxsize


def results() -> Console:
    """The console of stdout; into a pipe it writes whole lines, however long."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def messages() -> Console:
    """The console of stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """One line of JSON, in ASCII so that no terminal's encoding can break it."""
    typer.echo(json.dumps(document))


@contextmanager
def reported_errors() -> Iterator[None]:
    """End the command with a message and its exit code instead of a traceback."""
    try:
        yield
    except DynamicLoraError as error:
        _print_error(error)
        raise typer.Exit(exit_code(error)) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(ExitCode.INTERRUPTED) from error
    except BrokenPipeError as error:  # as of `dynamic-lora ls | head`, which wants no more
        _drop_buffered_output()
        raise typer.Exit(ExitCode.UNREAD) from error
    except OSError as error:
        _drop_buffered_output()
        print_failure(f"Input or output failed: {error.strerror or error}.")
        raise typer.Exit(ExitCode.REFUSED) from error


def _drop_buffered_output() -> None:
    """Python would fail at it once more when it ends, with a message and a status of its own."""
    with suppress(OSError):  # standard output is no file
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)


def print_failure(message: str, fix: str | None = None) -> None:
    """An error in red, and below it what to do."""
    console = messages()
    console.print(Text(f"error: {message}", style="red"))
    if fix:
        console.print(Text(f"fix: {fix}"))


def _print_error(error: DynamicLoraError) -> None:
    message, fix = error.message, error.fix
    if isinstance(error, ApiError):
        if error.problem.field and error.problem.field not in message:
            message = f"{error.problem.field}: {message}"
        if error.retry_after is not None and not fix:
            fix = f"Try again in {error.retry_after:g} s."
        # The server's own fix usually names them already.
        missing = [name for name in error.problem.near if name not in (fix or "") + message]
        if missing:
            fix = f"{fix or ''} Near names: {', '.join(missing)}.".strip()
    print_failure(message, fix)


def print_adapters(adapters: Sequence[Adapter]) -> None:
    """A table, one line an adapter."""
    is_terminal = sys.stdout.isatty()
    table = Table(box=None, pad_edge=False, show_edge=False)
    for heading in ("NAME", "VERSION", "KIND", "RANK", "PARAMETERS", "SIZE", "ON", "DESCRIPTION"):
        is_number = heading in ("RANK", "PARAMETERS", "SIZE")
        table.add_column(
            heading,
            justify="right" if is_number else "left",
            no_wrap=heading != "DESCRIPTION" or not is_terminal,
        )
    for adapter in adapters:
        cells = (
            adapter.name,
            adapter.version[:12],
            adapter.kind,
            str(adapter.rank),
            f"{adapter.num_parameters:,}",
            format_bytes(adapter.num_bytes),
            "merged" if adapter.mode == "merged" else adapter.tier or "-",
            adapter.description or "-",
        )
        table.add_row(*(Text(one_line(cell)) for cell in cells))
    _print_table(table)


def print_unreadable(adapters: Sequence[UnreadableAdapter]) -> None:
    """A message for each adapter that the server keeps and cannot serve."""
    for adapter in adapters:
        message = f"Unreadable: {adapter.name} {adapter.version[:12]}: {adapter.reason}"
        messages().print(one_line(message), markup=False)


def print_compositions(compositions: Sequence[Composition]) -> None:
    """A table, one line a saved composition."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    for heading in ("COMPOSITION", "VERSION", "ADAPTERS"):
        table.add_column(heading, no_wrap=heading != "ADAPTERS")
    for composition in compositions:
        version = "missing" if composition.version is None else composition.version[:12]
        cells = (composition.name, version, composition.text)
        table.add_row(*(Text(one_line(cell)) for cell in cells))
    _print_table(table)


def print_document(document: Mapping[str, Any]) -> None:
    """Every field of a document, one a line; of a list of sentences, each on its own."""
    table = Table(box=None, pad_edge=False, show_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in _flatten(document):
        table.add_row(Text(one_line(key), style="bold"), Text(value))
    _print_table(table)


def _print_table(table: Table) -> None:
    console = results()
    with console.capture() as capture:
        console.print(table)
    # Rich pads every cell, the last one of a line too.
    for line in capture.get().splitlines():
        typer.echo(line.rstrip())


def _flatten(document: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in document.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{name}.")
        elif isinstance(value, list) and any(" " in str(item) for item in value):
            yield from ((name, _cell(item)) for item in value)
        elif value not in (None, [], {}):
            yield name, _cell(value)


def _cell(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return one_line(", ".join(value))
    return one_line(value) if isinstance(value, str) else json.dumps(value)


def one_line(text: str) -> str:
    """`text` with its line breaks and control characters escaped: it came from elsewhere."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def format_bytes(num_bytes: int) -> str:
    """A size for people, in decimal units."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
