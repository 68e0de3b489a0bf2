"""`push`, `ls`, `show` and `rm`: the server's adapters, and its saved compositions."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer
from rich import progress as bars
from rich.text import Text

from dynamic_lora_client.cli import output
from dynamic_lora_client.cli.exit_codes import ExitCode
from dynamic_lora_client.cli.options import ApiKey, Json, Name, Url
from dynamic_lora_client.client import Client
from dynamic_lora_client.config import DEFAULT_URL
from dynamic_lora_client.errors import AdapterNotFound, NotFound
from dynamic_lora_client.files import Progress, UploadFiles
from dynamic_lora_client.types import Upload

_HUB_SCHEME = "hf://"


def push(
    name: Name,
    path: Annotated[
        str,
        typer.Argument(
            help="A PEFT directory, a .zip / .tar / .tar.gz, or hf://organisation/repository."
        ),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Take an adapter that names another base model.")
    ] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Upload an adapter under a name, or have the server fetch it from the Hub."""
    with output.reported_errors(), Client(url, api_key=api_key) as client:
        skipped: tuple[str, ...] = ()
        if path.startswith(_HUB_SCHEME):
            upload = _fetch(client, name, path, force)
        else:
            skipped = UploadFiles.find(path).skipped
            with _upload_bar(name) as on_progress:
                upload = client.upload(name, path, force=force, on_progress=on_progress)
        if as_json:
            output.print_json({"created": upload.created, "adapter": upload.adapter.document})
        else:
            _print_upload(upload, skipped)


def ls(as_json: Json = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """List the server's adapters and saved compositions."""
    with output.reported_errors(), Client(url, api_key=api_key) as client:
        adapters, compositions = client.adapters(), client.compositions()
        if as_json:
            output.print_json(
                {
                    "adapters": [adapter.document for adapter in adapters],
                    "unreadable": [adapter.document for adapter in adapters.unreadable],
                    "compositions": [composition.document for composition in compositions],
                }
            )
            return
        if adapters:
            output.print_adapters(adapters)
        if compositions:
            output.print_compositions(compositions)
        output.print_unreadable(adapters.unreadable)
        if not adapters and not adapters.unreadable and not compositions:
            output.messages().print("No adapters yet: 'dynamic-lora push NAME PATH' uploads one.")


def show(name: Name, as_json: Json = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show an adapter's passport, or a saved composition."""
    with output.reported_errors(), Client(url, api_key=api_key) as client:
        document = _document(client, name)
        if as_json:
            output.print_json(document)
        else:
            output.print_document(document)


def rm(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Delete an adapter, or a saved composition."""
    with output.reported_errors(), Client(url, api_key=api_key) as client:
        if not yes:
            _confirm_deletion(name)
        _delete(client, name)
        if as_json:
            output.print_json({"deleted": name})
        else:
            output.messages().print(f"Deleted {name}.", markup=False)


def _document(client: Client, name: str) -> Mapping[str, Any]:
    try:
        return client.adapter(name).document
    except AdapterNotFound as error:
        # Where there is neither, the error that says more of near names.
        with suppress(NotFound):
            return client.composition(name).document
        raise error


def _delete(client: Client, name: str) -> None:
    try:
        client.delete(name)
    except AdapterNotFound as error:
        with suppress(NotFound):
            client.delete_composition(name)
            return
        raise error


def _confirm_deletion(name: str) -> None:
    if not sys.stdin.isatty():
        raise typer.BadParameter("Pass --yes to delete without being asked.")
    try:
        agreed = typer.confirm(f"Delete {name}?", err=True)
    except typer.Abort:
        agreed = False
    if not agreed:
        output.messages().print("Nothing deleted.")
        raise typer.Exit(ExitCode.INTERRUPTED)


def _fetch(client: Client, name: str, source: str, force: bool) -> Upload:
    with output.messages().status(Text(f"The server fetches {source}")):
        return client.fetch(name, source, force=force)


@contextmanager
def _upload_bar(name: str) -> Iterator[Progress]:
    console = output.messages()
    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"Uploading {name}", total=None)
        yield lambda sent, total: bar.update(task, completed=sent, total=total)


def _print_upload(upload: Upload, skipped: tuple[str, ...]) -> None:
    adapter, console = upload.adapter, output.messages()
    state = "uploaded" if upload.created else "already there"
    size = output.format_bytes(adapter.num_bytes)
    output.results().print(
        f"{adapter.name} {adapter.version[:12]} {state}: {adapter.kind}, rank {adapter.rank}, "
        f"{len(adapter.target_modules)} target modules, {size}",
        markup=False,
        soft_wrap=True,
    )
    if skipped:
        console.print(output.one_line(f"Not sent: {', '.join(skipped)}"), markup=False)
    if adapter.ignored_files:
        ignored = ", ".join(adapter.ignored_files)
        console.print(output.one_line(f"Not needed: {ignored}"), markup=False)
    for note in adapter.notes:
        console.print(f"Note: {output.one_line(note)}", markup=False)
