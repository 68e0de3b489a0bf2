"""`dynamic-lora train CONFIG`: train one adapter from its recipe."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, cast

import typer
from rich import progress as bars
from rich.console import Console

from dynamic_lora_server.commands.logs import print_error
from dynamic_lora_server.config import DEVICES
from dynamic_lora_server.errors import ServerError

if TYPE_CHECKING:
    from dynamic_lora_server.training import Progress

_LINES_PER_RUN = 20
_INTERRUPTED = 130  # what shells make of a Ctrl-C


def train(
    config: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    data: Annotated[
        Path,
        typer.Option(envvar="DYNAMIC_LORA_DATA", help="Folder that the recipe's paths start from."),
    ] = Path(),
    base: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id to load the base from, instead of the recipe's."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write, instead of the recipe's.")
    ] = None,
    device: Annotated[str, typer.Option(help=f"{', '.join(DEVICES)}.")] = "auto",
    save_every: Annotated[
        int,
        typer.Option(min=0, help="Steps between adapters kept in OUTPUT-partial; 0 keeps none."),
    ] = 100,
) -> None:
    """Train a LoRA adapter on a recipe's data and write a folder that `push` uploads."""
    # Imported late: the terminal command lists its subcommands without loading torch.
    from dynamic_lora_server.base.base_model import resolve_base
    from dynamic_lora_server.training import (
        TrainingError,
        TrainingInterrupted,
        load_config,
        run_training,
    )

    console = Console(file=cast("IO[str]", _Dispensable(Console(stderr=True).file)))
    try:
        recipe = load_config(config)
        path = resolve_base(base or recipe.base, console=console).path
        with _ended_by_term(), _progress(console) as on_step:
            summary = run_training(
                recipe,
                base=path,
                data=data,
                output=output or Path(recipe.output),
                on_step=on_step,
                device=device,
                save_every=save_every,
            )
    except (TrainingError, ServerError) as error:
        print_error(error, console)
        raise typer.Exit(_INTERRUPTED if isinstance(error, TrainingInterrupted) else 1) from error
    left_out = f", {summary.num_too_long} too long and left out" if summary.num_too_long else ""
    dev = "" if summary.dev_loss is None else f", dev loss {summary.dev_loss:.4f}"
    _tell(
        f"{summary.output}: trained on {summary.num_answers} answers{left_out}; "
        f"loss of the last steps {summary.final_loss:.4f}{dev}"
    )


def _tell(text: str) -> None:
    """Print a line, and drop what cannot be written: the run has come to its end all the same."""
    with suppress(OSError):
        typer.echo(text)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would fail at it once more as it ends
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, stream.fileno())
            os.close(sink)


class _Dispensable:
    """A text stream that passes over what it cannot write: a disk is full, a reader has gone.

    A run of hours must not end for a line about it.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


@contextmanager
def _ended_by_term() -> Iterator[None]:
    """A machine that shuts down ends a run as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[["Progress"], None]]:
    """A live bar on a terminal, a line now and then in a log file."""
    if not console.is_terminal:
        yield lambda step: _print_line(console, step)
        return
    columns = (
        bars.TextColumn("Training"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("loss {task.fields[loss]:.3f}"),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None, loss=float("nan"))

        def show(step: "Progress") -> None:
            bar.update(task, total=step.num_steps, completed=step.step, loss=step.loss)
            _print_dev_loss(console, step)

        yield show


def _print_line(console: Console, step: "Progress") -> None:
    every = max(1, step.num_steps // _LINES_PER_RUN)
    if step.step % every == 0 or step.step == step.num_steps:
        console.print(f"step {step.step}/{step.num_steps} loss {step.loss:.4f} lr {step.lr:.2e}")
    _print_dev_loss(console, step)


def _print_dev_loss(console: Console, step: "Progress") -> None:
    if step.dev_loss is not None:
        console.print(f"step {step.step}/{step.num_steps} dev loss {step.dev_loss:.4f}")
