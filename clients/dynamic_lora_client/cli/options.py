"""Options that several subcommands share."""

from typing import Annotated

import typer

Url = Annotated[
    str,
    typer.Option("--url", envvar="DYNAMIC_LORA_URL", help="The server's address."),
]

Json = Annotated[
    bool,
    typer.Option("--json", help="Write one line of JSON, for scripts."),
]

Name = Annotated[str, typer.Argument(help="The name of an adapter, or of a composition.")]
