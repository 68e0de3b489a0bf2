"""`compose`: a weighted sum of adapters, saved under a name."""

from typing import Annotated

import typer

from dynamic_lora_client.cli import output
from dynamic_lora_client.cli.options import ApiKey, Json, Url
from dynamic_lora_client.client import Client
from dynamic_lora_client.config import DEFAULT_URL


def compose(
    name: Annotated[str, typer.Argument(help="The name it gets; used like an adapter's.")],
    text: Annotated[str, typer.Argument(help="The sum, such as 'ner*0.7+tone*0.3'.")],
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Save a weighted sum of adapters under a name."""
    with output.reported_errors(), Client(url, api_key=api_key) as client:
        composition = client.save_composition(name, text)
        if as_json:
            output.print_json(composition.document)
        else:
            version = (composition.version or "missing")[:12]
            output.results().print(
                f"{composition.name} {version} saved: {composition.text}",
                markup=False,
                soft_wrap=True,
            )
