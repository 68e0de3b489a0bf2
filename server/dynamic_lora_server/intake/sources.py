"""Adapters that the server fetches itself: from an allowed folder, or from the Hugging Face Hub."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dynamic_lora_adapters.errors import AdapterTooLarge, UnsafeArchive
from dynamic_lora_adapters.files.archive import ADAPTER_FILES, PICKLED_WEIGHTS_FILE, Intake
from dynamic_lora_adapters.files.safetensors_file import WEIGHTS_FILE
from dynamic_lora_adapters.home.store import NO_SPACE
from dynamic_lora_server.errors import InvalidParameter, ServerError

HUB_SCHEME = "hf://"
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
_HUB_TIMEOUT = 10.0
_MAX_SHOWN = 80


class SourceUnavailable(ServerError):
    """The Hub could not be reached or would not give the adapter.

    `retry_after` are the seconds after which the server asks it again, if it waits so long.
    """

    retry_after: int | None = None


class NotOnHub(InvalidParameter):
    """The Hub has no such repository, or does not show it to this server."""


def fetch_source(
    source: str,
    intake: Intake,
    *,
    roots: Sequence[Path],
    inbox: Path,
    max_bytes: int,
    endpoint: str | None = None,
) -> None:
    """Put the adapter that `source` names into `intake`.

    `source` is a folder or archive below one of `roots`, or `hf://org/repo`,
    with `@revision` if need be; downloads pass through the folder `inbox`.
    `endpoint` is the Hub's address if not the usual one. Blocking. Raises
    InvalidParameter naming `source`, of the Hub NotOnHub, SourceUnavailable, and what `intake`
    raises.
    """
    if source.startswith(HUB_SCHEME):
        repo, _, revision = source.removeprefix(HUB_SCHEME).partition("@")
        _from_hub(repo, revision or None, intake, inbox, max_bytes, endpoint)
    else:
        with _unreadable(source):
            _from_disk(_path(source, roots), intake)


def source_of(path: str, roots: Sequence[Path]) -> str:
    """What vLLM's `lora_path` means as a source: what is below a root, else, for
    `organisation/repository`, the Hub's. Looks at the disk."""
    if not _REPOSITORY.fullmatch(path) or any(_exists(root / path) for root in roots):
        return path
    return f"{HUB_SCHEME}{path}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, or a folder that may not be looked into
        return False


def _path(source: str, roots: Sequence[Path]) -> Path:
    try:
        return _allowed_path(source, roots)
    except (OSError, RuntimeError) as error:  # RuntimeError before Python 3.13
        reason = getattr(error, "strerror", None) or "its links go round in a circle"
        raise InvalidParameter(
            f"{source[:_MAX_SHOWN]!r} cannot be read: {reason}.", field="source"
        ) from error


def _allowed_path(source: str, roots: Sequence[Path]) -> Path:
    """The path, resolved; it and what it links to must lie below an allowed root."""
    if "\0" in source:
        raise InvalidParameter("source holds a NUL character.", field="source")
    # An absolute source replaces the root in the joined path.
    places = [((root / source).resolve(), root.resolve()) for root in roots]
    inside = [(path, root) for path, root in places if path.is_relative_to(root)]
    if not inside:
        raise InvalidParameter(
            f"{source!r} is not below a folder that this server may read adapters from.",
            field="source",
            fix="Upload the files instead, or start the server with --adapter-root FOLDER.",
        )
    path, root = next((place for place in inside if place[0].exists()), inside[0])
    _check_links(path, root)
    return path


def _check_links(path: Path, root: Path) -> None:
    for entry in path.iterdir() if path.is_dir() else ():
        if not entry.resolve(strict=True).is_relative_to(root):
            raise InvalidParameter(
                f"{entry.name!r} links to a place outside the allowed folder.", field="source"
            )


@contextmanager
def _unreadable(source: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:  # safetensors saves files for their owner alone
        name = Path(str(error.filename)).name
        raise InvalidParameter(
            f"The server may not read {name!r} of {source!r}.",
            field="source",
            fix="Let the user that the server runs as read the files, or upload them instead.",
        ) from error


def _from_disk(path: Path, intake: Intake) -> None:
    if path.is_dir():
        intake.add_folder(path)
    elif path.is_file():
        with path.open("rb") as stream:
            intake.add(path.name, stream)
    else:
        raise InvalidParameter(f"There is no folder or file {path.name!r}.", field="source")


def _from_hub(
    repo: str,
    revision: str | None,
    intake: Intake,
    inbox: Path,
    max_bytes: int,
    endpoint: str | None,
) -> None:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint)
    with _hub_errors(repo):
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_HUB_TIMEOUT)
    wanted = _wanted({f.rfilename: f.size or 0 for f in info.siblings or ()}, max_bytes)
    with _hub_errors(repo):
        for name in wanted:
            api.hf_hub_download(repo, name, revision=info.sha, local_dir=inbox)
    for name in wanted:
        with (inbox / name).open("rb") as stream:
            intake.add(name, stream)


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import (
        DisabledRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    not_there = (
        DisabledRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    try:
        yield
    except not_there as error:
        raise NotOnHub(
            f"The Hub has no model {repo!r}, or not this revision, or not for this server.",
            field="source",
            fix="Check the name; a private model needs HF_TOKEN in the server's environment.",
        ) from error
    except Exception as error:  # the transport's errors are not part of the Hub's interface
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise  # the store's, not the Hub's
        raise SourceUnavailable(
            f"The Hub did not give {repo!r}: {_named(error)}.",
            field="source",
            fix="Check the server's connection, or upload the files instead.",
        ) from error


def _named(error: Exception) -> str:
    """An error of the Hub's client by its class, with the Hub's status if it answered."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    name = type(error).__name__
    return name if status is None else f"{name}, status {status}"


def _wanted(sizes: dict[str, int], max_bytes: int) -> list[str]:
    """The adapter's files in a Hub repository; a pickle in their place is refused unread."""
    wanted = sorted(ADAPTER_FILES & sizes.keys())
    if WEIGHTS_FILE not in wanted and PICKLED_WEIGHTS_FILE in sizes:
        raise UnsafeArchive(
            "The repository has its weights as a pickle, which can run code; it was not read.",
            field=PICKLED_WEIGHTS_FILE,
            fix="Convert it with save_pretrained(path, safe_serialization=True).",
        )
    if sum(sizes[name] for name in wanted) > max_bytes:
        raise AdapterTooLarge(f"The adapter is larger than {max_bytes:,} bytes.", field="source")
    return wanted
