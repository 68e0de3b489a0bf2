"""`dynamic-lora train CONFIG`: train one adapter from its recipe."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import progress as bars
from rich.console import Console

from dynamic_lora_server.commands.logs import print_error
from dynamic_lora_server.errors import ServerError

if TYPE_CHECKING:
    from dynamic_lora_server.training import Progress

_LINES_PER_RUN = 20


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
) -> None:
    """Train a LoRA adapter on a recipe's data and write a folder that `push` uploads."""
    # Imported late: the terminal command lists its subcommands without loading torch.
    from dynamic_lora_server.base_model import resolve_base
    from dynamic_lora_server.training import TrainingError, load_config, run_training

    console = Console(stderr=True)
    try:
        recipe = load_config(config)
        path = resolve_base(base or recipe.base, console=console).path
        with _progress(console) as on_step:
            summary = run_training(
                recipe, base=path, data=data, output=output or Path(recipe.output), on_step=on_step
            )
    except (TrainingError, ServerError) as error:
        print_error(error, console)
        raise typer.Exit(1) from error
    left_out = f", {summary.num_too_long} too long and left out" if summary.num_too_long else ""
    typer.echo(
        f"{summary.output}: trained on {summary.num_answers} answers{left_out}; "
        f"loss of the last steps {summary.final_loss:.4f}"
    )


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
        yield lambda step: bar.update(
            task, total=step.num_steps, completed=step.step, loss=step.loss
        )


def _print_line(console: Console, step: "Progress") -> None:
    every = max(1, step.num_steps // _LINES_PER_RUN)
    if step.step % every == 0 or step.step == step.num_steps:
        console.print(f"step {step.step}/{step.num_steps} loss {step.loss:.4f} lr {step.lr:.2e}")
