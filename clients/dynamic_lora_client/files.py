"""The files of an upload: chosen, opened and read with progress. Nothing is held in memory."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from dynamic_lora_client.errors import InvalidArgument

Progress = Callable[[int, int], None]
"""Called with the bytes sent so far and the bytes in all; a retry starts again at 0."""

FilePart = tuple[str, tuple[str, BinaryIO, str]]
"""A multipart field in httpx's form: field name, (file name, content, media type)."""

_MEDIA_TYPE = "application/octet-stream"

_CONFIG_FILE = "adapter_config.json"
_WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLED_WEIGHTS_FILE = "adapter_model.bin"

SENT_FILES = frozenset(
    {
        _CONFIG_FILE,
        _WEIGHTS_FILE,
        "task.json",
        "chat_template.jinja",
        "tokenizer_config.json",
        "generation_config.json",
    }
)
"""What the server reads of a PEFT directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadFiles:
    """What goes over the wire for one path.

    A directory gives the files that the server reads (`SENT_FILES`); `skipped` are its
    other visible ones, such as logs and a trainer's state, which are often larger
    than the adapter. A file (an archive) gives itself.
    """

    paths: tuple[Path, ...]
    skipped: tuple[str, ...] = ()

    @classmethod
    def find(cls, path: str | os.PathLike[str]) -> Self:
        """Choose the files at `path`.

        Raises InvalidArgument if there is nothing that can be read, or no adapter with
        weights in safetensors in a directory.
        """
        with _reading(Path(path)) as root:
            return cls._of(root)

    @classmethod
    def _of(cls, root: Path) -> Self:
        if root.is_file():
            return cls(paths=(root,))
        if not root.is_dir():
            raise InvalidArgument(
                f"There is no file or directory {str(root)!r}.",
                fix="Give a PEFT directory, or a .zip, .tar or .tar.gz of one.",
            )
        files = sorted(p for p in root.iterdir() if p.is_file() and not p.name.startswith("."))
        _check_complete(root, {p.name for p in files})
        return cls(
            paths=tuple(p for p in files if p.name in SENT_FILES),
            skipped=tuple(p.name for p in files if p.name not in SENT_FILES),
        )

    @contextmanager
    def open(self, on_progress: Progress | None = None) -> Iterator[list[FilePart]]:
        """The opened files as parts of a multipart body, closed at the end.

        Raises InvalidArgument if one cannot be read.
        """
        meter = _Meter(on_progress)
        with ExitStack() as stack:
            yield [
                ("files", (path.name, stack.enter_context(_open(path, meter)), _MEDIA_TYPE))
                for path in self.paths
            ]


def _check_complete(root: Path, names: set[str]) -> None:
    if _CONFIG_FILE not in names:
        raise InvalidArgument(
            f"{str(root)!r} is not a PEFT directory: it has no {_CONFIG_FILE}.",
            fix="Give the directory that PEFT's save_pretrained wrote.",
        )
    if _WEIGHTS_FILE in names:
        return
    if _PICKLED_WEIGHTS_FILE in names:
        raise InvalidArgument(
            f"The weights in {str(root)!r} are a pickle, which can run code; it was not sent.",
            fix="Save them with save_pretrained(path, safe_serialization=True).",
        )
    raise InvalidArgument(f"{str(root)!r} has no {_WEIGHTS_FILE}.")


class _Meter:
    """Adds up what several files gave."""

    def __init__(self, on_progress: Progress | None) -> None:
        self._total = 0
        self._sent = 0
        self._on_progress = on_progress

    def expect(self, num_bytes: int) -> None:
        self._total += num_bytes

    def add(self, num_bytes: int) -> None:
        self._sent += num_bytes
        if self._on_progress is not None and num_bytes:
            self._on_progress(self._sent, self._total)


class _MeteredFile(io.BufferedReader):
    """A file that reports each read to a meter."""

    def __init__(self, path: Path, meter: _Meter) -> None:
        super().__init__(io.FileIO(path))
        self._meter = meter
        meter.expect(os.fstat(self.fileno()).st_size)

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._meter.add(len(data))
        return data


def _open(path: Path, meter: _Meter) -> _MeteredFile:
    with _reading(path):
        return _MeteredFile(path, meter)


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    try:
        yield path
    except OSError as error:
        raise InvalidArgument(f"Cannot read {str(path)!r}: {error.strerror}.") from error
