"""The command `dynamic-lora`."""

import io
import os
import sys
from typing import Annotated

import typer

from dynamic_lora_client._version import __version__
from dynamic_lora_client.cli import external
from dynamic_lora_client.cli.adapters import ls, push, rm, show
from dynamic_lora_client.cli.compositions import compose
from dynamic_lora_client.cli.exit_codes import SUMMARY
from dynamic_lora_client.cli.generate import generate


def create_app() -> typer.Typer:
    """The command with its own subcommands and those of installed packages."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback(help="One base model, many LoRA adapters.", epilog=SUMMARY)(_root)
    for command in (generate, push, ls, show, rm, compose):
        app.command()(command)
    external.add_commands(app)
    return app


def main() -> None:
    """Entry point of the command."""
    _replace_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character gets a mark, not a traceback.
            stream.reconfigure(errors="replace")
    create_app()()


def _replace_closed_streams() -> None:
    """Whoever starts the command may have closed its standard streams: they are None then."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dynamic-lora {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options of the command itself."""
