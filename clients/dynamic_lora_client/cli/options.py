"""Options that several subcommands share."""

from typing import Annotated

import typer

Url = Annotated[
    str,
    typer.Option("--url", envvar="DYNAMIC_LORA_URL", help="The server's address."),
]

ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", envvar="DYNAMIC_LORA_API_KEY", help="A key of the server, if it wants one."
    ),
]

Json = Annotated[
    bool,
    typer.Option("--json", help="Write one line of JSON, for scripts."),
]

Name = Annotated[str, typer.Argument(help="The name of an adapter, or of a composition.")]
