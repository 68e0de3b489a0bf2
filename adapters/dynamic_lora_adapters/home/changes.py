"""Changes of a home's store and index: one at a time, and none once they are closed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dynamic_lora_adapters.errors import StoreFailed
from dynamic_lora_adapters.home.store import BlobStore


class Changes:
    """Lets one thread at a time change a store, and what else says what is in it."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._over = False

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the right to change; once it is given back, delete what was removed.

        Raises `StoreFailed` after `closing`.
        """
        try:
            with self._lock:
                if self._over:
                    raise StoreFailed(
                        "The server is shutting down; adapters do not change any more.",
                        field="home",
                        fix="Send the request again once it has started.",
                    )
                yield
        finally:
            if not self._over:  # else the files may be another process's by now
                self._store.sweep()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Wait for what changes; nothing changes afterwards."""
        with self._lock:
            self._over = True
            yield
