"""Adapters on disk, by content.

    home/
        lock                          held while a server uses the folder
        id                            which home this is (see `identity`)
        index.sqlite                  names, versions, history (see `index`)
        adapters/<digest>/            one adapter, never changed once it is there
            adapter_config.json
            adapter_model.safetensors
            task.json                 if the adapter has a card
            chat.json                 if it has a chat template or end tokens
        staging/<random>/             uploads in progress, and folders on their way out

A folder enters `adapters/` by one rename, after its files were flushed to disk,
and leaves it by one rename back to `staging/`. So whatever a crash interrupts,
`adapters/` holds whole adapters only, and `staging/` can be emptied at start.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dynamic_lora_adapters.errors import AdapterError, StoreFailed
from dynamic_lora_adapters.files.archive import CONFIG_FILE
from dynamic_lora_adapters.files.card import CARD_FILE
from dynamic_lora_adapters.files.chat import CHAT_FILE
from dynamic_lora_adapters.files.safetensors_file import WEIGHTS_FILE

if sys.platform != "win32":
    import fcntl

# A disk that takes no more, by its own size, a quota's or ulimit's, or because it is read-only.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_DRAFT = re.compile(r"[0-9a-f]{32}")  # names in the staging folder
KEPT_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, CHAT_FILE})


class BlobStore:
    """The folders under one home; not thread-safe but for `staging`, `prepare`, `sweep` and reads.

    Opening takes the home for this process: raises `AdapterError` if another
    holds it, `StoreFailed` if it cannot be written. `close` gives it back.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self._blobs = home / "adapters"
        self._staging = home / "staging"
        with self._usable():
            for folder in (self._blobs, self._staging):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = _take_home(home)
        # What a process that was killed has left. All else is somebody else's.
        self._doomed = [one for one in self._staging.iterdir() if _DRAFT.fullmatch(one.name)]
        self.sweep()

    def close(self) -> None:
        """Let another process have the home."""
        self._lock.close()

    @property
    def id_file(self) -> Path:
        """The file with the home's id."""
        return self.home / "id"

    def id(self) -> str | None:
        """The home's id, if it has one. Raises `StoreFailed` if it cannot be read."""
        with self._usable():
            try:
                return self.id_file.read_text(encoding="utf-8", errors="replace").strip() or None
            except FileNotFoundError:
                return None

    def put_id(self, text: str) -> None:
        """Give the home an id; a crash leaves it with or without. Raises `StoreFailed`."""
        draft = self._staging / secrets.token_hex(16)
        with self._usable():
            draft.write_text(f"{text}\n", encoding="utf-8")
            _flush(draft)
            os.replace(draft, self.id_file)
            _flush(self.home)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A fresh empty folder for one upload; gone at the end unless published.

        Raises `StoreFailed` where its disk takes no more, also for what is written meanwhile.
        """
        folder = self._staging / secrets.token_hex(16)
        try:
            folder.mkdir()
            yield folder
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise StoreFailed(
                f"The server's disk takes no more: {error.strerror}.",
                field="files",
                fix="Free space under the server's home, or delete adapters. Nothing was changed.",
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def path(self, digest: str) -> Path:
        """Where the adapter of this digest is, if it is there."""
        return self._blobs / digest

    def digests(self) -> set[str]:
        """All digests in the store."""
        return {folder.name for folder in self._blobs.iterdir()}

    def sizes(self, digest: str) -> dict[str, int]:
        """Bytes of each file of an adapter; empty if there is no such adapter.

        Raises OSError for one that is there and cannot be looked at.
        """
        folder = self.path(digest)
        try:
            names = KEPT_FILES.intersection(os.listdir(folder))
        except FileNotFoundError:
            return {}
        return {name: (folder / name).stat().st_size for name in names}

    def prepare(self, folder: Path) -> None:
        """Delete files that are not kept, and flush the rest for `publish`."""
        for path in folder.iterdir():
            if path.name in KEPT_FILES:
                _flush(path)
            else:
                path.unlink()
        _flush(folder)

    def publish(self, folder: Path, digest: str) -> None:
        """Move a folder that is prepared to its place; one that is there stays.

        The same content can be spelt in files of other sizes, and the index knows those.
        """
        target = self.path(digest)
        if not target.exists():
            os.replace(folder, target)
            _flush(self._blobs)

    def remove(self, digest: str) -> None:
        """Drop an adapter; it disappears at once and as a whole, its files with `sweep`.

        Raises `StoreFailed` where the system refuses.
        """
        doomed = self._staging / secrets.token_hex(16)
        try:
            os.replace(self.path(digest), doomed)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreFailed(
                f"The files of version {digest:.12} cannot be removed: {error.strerror}.",
                field="home",
                fix="Let the user that the server runs as write to its home.",
            ) from error
        self._doomed.append(doomed)

    def sweep(self) -> None:
        """Delete the files of what was removed, which takes as long as they are large."""
        with contextlib.suppress(IndexError):  # another thread may take the last
            while True:
                shutil.rmtree(self._doomed.pop(), ignore_errors=True)

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreFailed(
                f"The home {str(self.home)!r} cannot be written: {error.strerror}.",
                field="home",
                fix="Make it a folder that this user may write to, or give another --home.",
            ) from error


def _take_home(home: Path) -> IO[bytes]:
    stream = (home / "lock").open("wb")
    if sys.platform != "win32":
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise AdapterError(
                f"Another server is using {str(home)!r}.",
                field="home",
                fix="Stop it, or give this server a --home of its own.",
            ) from None
    return stream


def _flush(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    if sys.platform == "win32" and path.is_dir():
        return  # Windows opens no folders and needs no flush for them.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
