"""What the commands say: a log, for people on a terminal or a line a record, and why they end."""

import logging

from rich.console import Console
from rich.logging import RichHandler

_LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_up_logging(level: str, console: Console) -> None:
    """Send the process's log to the console; in a file or a container's log nothing is wrapped."""
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(console.file)
        handler.setFormatter(logging.Formatter(_LINE))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def print_error(error: Exception, console: Console) -> None:
    """What ends the command, in red, and below it what to do."""
    console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    if fix := getattr(error, "fix", None):
        console.print(f"fix: {fix}", markup=False, highlight=False, soft_wrap=True)
