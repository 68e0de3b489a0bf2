"""Adapters that the server fetches itself."""

import errno
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)

from dynamic_lora_adapters.files.archive import Intake
from dynamic_lora_server.errors import InvalidParameter, ServerError
from dynamic_lora_server.intake.sources import NotOnHub, SourceUnavailable, fetch_source


def fetch(source: str, roots: list[Path], tmp_path: Path, endpoint: str | None = None) -> set[str]:
    folder, inbox = tmp_path / "staging", tmp_path / "inbox"
    folder.mkdir()
    inbox.mkdir()
    fetch_source(
        source, Intake(folder), roots=roots, inbox=inbox, max_bytes=10**6, endpoint=endpoint
    )
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "ner").mkdir(parents=True)
    (root / "ner" / "adapter_config.json").write_text("{}")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "adapter_config.json").write_text("{}")
    return root


@pytest.mark.parametrize("form", ["ner", "./ner", "{root}/ner"])
def test_a_folder_below_a_root(root: Path, tmp_path: Path, form: str) -> None:
    source = form.format(root=root)
    assert fetch(source, [tmp_path / "none", root], tmp_path) == {"adapter_config.json"}


@pytest.mark.parametrize("form", ["../secret", "{parent}/secret", "ner/../../secret", "link"])
def test_nothing_outside_the_roots(root: Path, tmp_path: Path, form: str) -> None:
    (root / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidParameter, match="not below a folder") as caught:
        fetch(form.format(parent=tmp_path), [root], tmp_path)
    assert caught.value.field == "source"


def test_a_file_that_links_outside(root: Path, tmp_path: Path) -> None:
    (root / "ner" / "task.json").symlink_to(tmp_path / "secret" / "adapter_config.json")
    with pytest.raises(InvalidParameter, match="links to a place outside"):
        fetch("ner", [root], tmp_path)


def test_without_roots_every_path_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="--adapter-root|not below") as caught:
        fetch(str(root / "ner"), [], tmp_path)
    assert "--adapter-root" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("nix", "no folder or file"),
        ("a\0b", "NUL"),
        ("a" * 5000, "'a{80}' cannot be read: File name too long"),
        ("circle", "'circle'"),
        ("ner", "'ner' cannot be read: "),
        ("dangling", "'dangling' cannot be read: No such file or directory"),
    ],
)
def test_paths_that_are_nothing(root: Path, tmp_path: Path, source: str, text: str) -> None:
    (root / "circle").symlink_to(root / "circle")
    (root / "ner" / "task.json").symlink_to(root / "ner" / "task.json")
    (root / "dangling").mkdir()
    (root / "dangling" / "task.json").symlink_to(root / "nix")
    with pytest.raises(InvalidParameter, match=text):
        fetch(source, [root], tmp_path)


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(SourceUnavailable, match="did not give 'org/repo'"):
        fetch("hf://org/repo@main", [], tmp_path, endpoint=f"http://127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("error", "status", "told", "text"),
    [
        (HfHubHTTPError, 429, SourceUnavailable, "HfHubHTTPError, status 429"),
        (RepositoryNotFoundError, 404, NotOnHub, "has no model 'org/repo'"),
        (GatedRepoError, 403, NotOnHub, "not for this server"),
        (DisabledRepoError, 403, NotOnHub, "not for this server"),
    ],
)
def test_trouble_is_told_from_what_the_hub_does_not_have(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[HfHubHTTPError],
    status: int,
    told: type[ServerError],
    text: str,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        answer: Any = httpx.Response(status, request=httpx.Request("GET", "https://hub"))
        raise error(f"{status} Client Error.", response=answer)

    monkeypatch.setattr(HfApi, "model_info", refuse)
    with pytest.raises(told, match=text):
        fetch("hf://org/repo", [], tmp_path)


def test_a_hub_name_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="no model 'a/b/c'"):
        fetch("hf://a/b/c", [], tmp_path, endpoint="http://127.0.0.1:9")


def test_a_file_that_the_server_may_not_read_is_named(root: Path, tmp_path: Path) -> None:
    class Private(Intake):
        def add_folder(self, source: Path) -> None:
            path = source / "adapter_model.safetensors"
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with pytest.raises(InvalidParameter, match="may not read 'adapter_model.safetensors'") as told:
        fetch_source("ner", Private(tmp_path), roots=[root], inbox=tmp_path, max_bytes=10**6)
    assert told.value.field == "source"


def test_a_disk_that_is_full_is_not_the_hubs_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HfApi, "model_info", full)
    with pytest.raises(OSError, match="No space left"):
        fetch("hf://org/repo", [], tmp_path)
