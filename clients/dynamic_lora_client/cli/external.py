"""Subcommands of other packages, found by entry point and imported only when called."""

from importlib.metadata import EntryPoint, entry_points

import typer

from dynamic_lora_client.cli.exit_codes import ExitCode
from dynamic_lora_client.cli.output import print_failure

GROUP = "dynamic_lora.commands"

_HELP = {
    "serve": "Serve a base model and its adapters over HTTP.",
    "train": "Train an adapter from a recipe.",
}

# Every word after the name is the command's own, `--help` among them.
_PASS_THROUGH = {
    "allow_extra_args": True,
    "allow_interspersed_args": False,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


def add_commands(app: typer.Typer) -> None:
    """Register the commands of the group without importing them."""
    found = {entry_point.name: entry_point for entry_point in entry_points(group=GROUP)}
    for name in sorted(found):
        _add_command(app, found[name])


def _add_command(app: typer.Typer, entry_point: EntryPoint) -> None:
    @app.command(
        entry_point.name,
        help=_HELP.get(entry_point.name, f"Provided by {entry_point.module}."),
        context_settings=_PASS_THROUGH,
    )
    def command(context: typer.Context) -> None:
        try:
            _run(entry_point, context)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("dynamic_lora"):
                raise  # a fault of this package, not of the installation
            print_failure(
                f"'{entry_point.name}' needs packages that are not installed: {error}.",
                "In a checkout of Dynamic LoRA: pip install '.[server]'",
            )
            raise typer.Exit(ExitCode.MISSING_DEPENDENCY) from error


def _run(entry_point: EntryPoint, context: typer.Context) -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(entry_point.name)(entry_point.load())
    app(args=context.args, prog_name=context.command_path)
