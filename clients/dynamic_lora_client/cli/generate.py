"""`generate`: text in, text out."""

import sys
from contextlib import closing
from typing import Annotated, Any, cast

import typer

from dynamic_lora_client.cli import output
from dynamic_lora_client.cli.options import ApiKey, Json, Url
from dynamic_lora_client.client import Client
from dynamic_lora_client.config import DEFAULT_URL
from dynamic_lora_client.types import Generation, Parameters


def generate(
    text: Annotated[str, typer.Argument(help="The input; '-' or none reads stdin.")] = "-",
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", help="The task; none: the base model.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this much probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text; may be given again.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Send the text as the prompt, past the task's template.")
    ] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Generate text with an adapter, printing it as it comes."""
    parameters = _given(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop or None,
    )
    with output.reported_errors(), Client(url, api_key=api_key) as client:
        inputs = _read_stdin() if text == "-" else text
        if as_json:
            generation = client.generate(inputs, adapter=adapter, raw=raw, **parameters)
            output.print_json(_to_json(generation))
        else:
            _print_stream(client, inputs, adapter, raw, parameters)


def _given(**values: Any) -> Parameters:
    """Only what was given: the rest is for the task card and the server to set."""
    return cast(Parameters, {key: value for key, value in values.items() if value is not None})


def _read_stdin() -> str:
    """Standard input as text, without the line end that shells put after it."""
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"Standard input is not UTF-8: {error}.") from error
    return text.removesuffix("\n").removesuffix("\r")


def _print_stream(
    client: Client, inputs: str, adapter: str | None, raw: bool, parameters: Parameters
) -> None:
    """Print each piece as it arrives, and a line end after the last."""
    num_printed, is_whole = 0, False
    try:
        with closing(client.stream(inputs, adapter=adapter, raw=raw, **parameters)) as events:
            for event in events:
                is_whole = isinstance(event, Generation)
                piece = event.text[num_printed:] if is_whole else event.text
                typer.echo(piece, nl=False)
                num_printed += len(piece)
    finally:
        # Also after an interruption, so that what follows starts on its own line.
        if num_printed or is_whole:
            typer.echo()


def _to_json(generation: Generation) -> dict[str, Any]:
    return {
        "generated_text": generation.text,
        "adapter": generation.adapter,
        "adapter_version": generation.adapter_version,
        "finish_reason": generation.finish_reason,
        "num_prompt_tokens": generation.num_prompt_tokens,
        "num_cached_tokens": generation.num_cached_tokens,
        "num_tokens": generation.num_tokens,
        "seed": generation.seed,
    }
