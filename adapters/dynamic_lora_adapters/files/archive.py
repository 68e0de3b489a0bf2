"""Taking in the files of an upload: loose ones, or one .zip, .tar or .tar.gz of them.

Only the files of a fixed list are ever written, flat, under their own names.
Everything is counted while it is written, so a header that lies about a size
gains nothing. Imports no torch.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from dynamic_lora_adapters.errors import AdapterTooLarge, InvalidAdapter, UnsafeArchive
from dynamic_lora_adapters.files.card import CARD_FILE
from dynamic_lora_adapters.files.chat import CHAT_SOURCES
from dynamic_lora_adapters.files.safetensors_file import WEIGHTS_FILE
from dynamic_lora_adapters.files.unpacking import (
    BROKEN_ARCHIVE,
    CHUNK_BYTES,
    member_reader,
    too_large,
)

CONFIG_FILE = "adapter_config.json"
# Where PEFT saves without safetensors; what it wrote before may lie beside the real file.
PICKLED_WEIGHTS_FILE = "adapter_model.bin"
ADAPTER_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, CARD_FILE}) | CHAT_SOURCES

# What trainers and the Hub put beside an adapter. Nothing here is read or kept,
# not even looked into: training_args.bin is a pickle.
IGNORED_FILES = frozenset(
    {
        ".DS_Store",
        ".gitattributes",
        ".gitignore",
        "LICENSE",
        "LICENSE.md",
        "LICENSE.txt",
        "NOTICE",
        "README.md",
        "added_tokens.json",
        "additional_config.json",
        "all_results.json",
        "args.json",
        "chat_template.json",
        "config.json",
        "eval_results.json",
        "latest",
        "llamaboard_config.yaml",
        "logging.jsonl",
        "merges.txt",
        "optimizer.bin",
        "optimizer.pt",
        "preprocessor_config.json",
        "processor_config.json",
        "running_log.txt",
        "scaler.pt",
        "scheduler.bin",
        "scheduler.pt",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "train_results.json",
        "trainer_log.jsonl",
        "trainer_state.json",
        "training_args.bin",
        "training_args.yaml",
        "training_eval_loss.png",
        "training_loss.png",
        "vocab.json",
        "vocab.txt",
        "zero_to_fp32.py",
    }
)
# One for each process: rng_state_0.pth, random_states_1.pkl.
_RANDOM_STATES = re.compile(r"rng_state(_\d+)?\.pth|random_states_\d+\.pkl")

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_MAX_NAME_LENGTH = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadLimits:
    """Caps on one upload.

    `max_bytes` counts all bytes after unpacking, ignored files included;
    `max_files` counts archive members, loose files, and what a folder holds.
    """

    max_bytes: int = 2 << 30
    max_files: int = 256

    def __post_init__(self) -> None:
        if self.max_bytes < 1 or self.max_files < 1:
            raise ValueError("upload limits must be at least 1")


class Intake:
    """Collects the files of one upload in a folder.

    Use: one `Intake` per upload, `add` for each file that comes; then hand the
    folder and `ignored_files` to the registry. Every refusal is an
    `InvalidAdapter` that names the file; the folder is then only fit to be thrown away.
    """

    def __init__(self, folder: Path, limits: UploadLimits | None = None) -> None:
        self._folder = folder
        self._limits = limits or UploadLimits()
        self._num_bytes = 0
        self._num_files = 0
        self._seen: set[str] = set()
        self._ignored: list[str] = []

    @property
    def ignored_files(self) -> list[str]:
        """Names of the files that were dropped unread, in order of arrival."""
        return [_readable(name) for name in self._ignored]

    def add(self, filename: str, stream: BinaryIO) -> None:
        """Take one uploaded file: an adapter's file, or an archive of them.

        Archives are known by their content. `stream` must be seekable.
        """
        leaf = _checked_parts(filename)[-1:]
        if leaf and (leaf[0] in ADAPTER_FILES or _is_ignored(leaf) or _is_pickle(leaf[0])):
            self._take(leaf, stream)
            return
        unpack = member_reader(stream)
        if unpack is None:
            raise _unexpected(filename)
        top_folders: set[str] = set()
        try:
            for name, member in unpack(self._limits.max_bytes, stream):
                parts = _checked_parts(name)
                if member is None:
                    self._count_file()
                else:
                    self._take(_below_top(parts, top_folders), member)
        except BROKEN_ARCHIVE as error:
            raise InvalidAdapter(
                f"The archive {filename!r} is broken: {error}.",
                field=filename,
                fix="Pack the adapter's files again as .zip, .tar or .tar.gz.",
            ) from None

    def add_folder(self, source: Path) -> None:
        """Take the adapter's files of a PEFT folder on this machine, as its trainer left it.

        What else lies there is not read and counts as ignored. Raises `InvalidAdapter` if
        there is no such folder, `UnsafeArchive` if its weights are a pickle alone.
        """
        if not source.is_dir():
            raise InvalidAdapter(f"{str(source)!r} is not a folder.", field="source")
        paths = {path.name: path for path in sorted(source.iterdir())}
        if PICKLED_WEIGHTS_FILE in paths and WEIGHTS_FILE not in paths:
            raise _pickled(PICKLED_WEIGHTS_FILE)
        for name, path in paths.items():
            if name in ADAPTER_FILES and not path.is_dir():
                with path.open("rb") as stream:
                    self._take([name], stream)
            else:
                self._count_file()
                self._ignored.append(f"{name}/" if path.is_dir() else name)

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > self._limits.max_bytes:
            raise too_large(self._limits.max_bytes)

    def _count_file(self) -> None:
        self._num_files += 1
        if self._num_files > self._limits.max_files:
            raise AdapterTooLarge(
                f"The upload holds more than {self._limits.max_files} files.", field="files"
            )

    def _take(self, parts: list[str], stream: IO[bytes]) -> None:
        leaf = parts[-1] if parts else ""
        self._count_file()
        if _is_ignored(parts):
            self._ignored.append("/".join(parts))
            return
        if _is_pickle(leaf):
            raise _pickled(leaf)
        if leaf not in ADAPTER_FILES:
            raise _unexpected("/".join(parts))
        if leaf in self._seen:
            raise UnsafeArchive(f"The file {leaf!r} comes twice.", field=leaf)
        self._seen.add(leaf)
        with (self._folder / leaf).open("xb") as target:
            while chunk := stream.read(CHUNK_BYTES):
                self._count(len(chunk))
                target.write(chunk)


def _readable(name: str) -> str:
    """A name whose bytes were not UTF-8 as one that can be written in JSON."""
    return name.encode("utf-8", "replace").decode()


def _checked_parts(name: str) -> list[str]:
    if len(name) > _MAX_NAME_LENGTH:
        raise UnsafeArchive(f"A file's name is {len(name)} characters long.", field="files")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or any(c in name for c in "\\:\0"):
        raise UnsafeArchive(
            f"The file name {name!r} points outside the upload.",
            field=name,
            fix="Use plain relative names.",
        )
    return parts


def _below_top(parts: list[str], top_folders: set[str]) -> list[str]:
    """Strip the one folder that all members may share; `top_folders` remembers it."""
    if _is_ignored(parts):
        return parts
    top_folders.add(parts[0] if len(parts) > 1 else "")
    if len(parts) > 2 or len(top_folders) > 1:
        name = "/".join(parts)
        raise UnsafeArchive(
            f"The archive's member {name!r} lies in a folder of its own.",
            field=name,
            fix="Pack the adapter's files alone, without subfolders.",
        )
    return parts[-1:]


def _is_ignored(parts: list[str]) -> bool:
    # Finder packs "__MACOSX/" and "._name" beside the real files.
    return bool(parts) and (
        parts[-1] in IGNORED_FILES
        or parts[-1] == PICKLED_WEIGHTS_FILE
        or parts[-1].startswith("._")
        or parts[0] == "__MACOSX"
        or _RANDOM_STATES.fullmatch(parts[-1]) is not None
    )


def _is_pickle(leaf: str) -> bool:
    return leaf.lower().endswith(_PICKLE_SUFFIXES)


def check_weights(folder: Path, ignored_files: Iterable[str]) -> None:
    """Raise `UnsafeArchive` for an upload whose weights are a pickle alone."""
    leaves = {name.rpartition("/")[2] for name in ignored_files}
    if PICKLED_WEIGHTS_FILE in leaves and not (folder / WEIGHTS_FILE).exists():
        raise _pickled(PICKLED_WEIGHTS_FILE)


def _pickled(leaf: str) -> UnsafeArchive:
    return UnsafeArchive(
        f"{leaf!r} is a pickle, which can run code; it was not read.",
        field=leaf,
        fix="Save with save_pretrained(path, safe_serialization=True) "
        "and upload adapter_model.safetensors.",
    )


def _unexpected(name: str) -> InvalidAdapter:
    return InvalidAdapter(
        f"The file {name!r} belongs to no adapter and is no archive.",
        field=name,
        fix=f"Upload {', '.join(sorted(ADAPTER_FILES))}, or a .zip, .tar or .tar.gz of them.",
    )
