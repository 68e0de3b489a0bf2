"""A version that is in use."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

from dynamic_lora_adapters.home.inspection import AdapterVersion


class Lease(AbstractContextManager["Lease"]):
    """Keeps a version's files on disk while it is in use; releasing twice is harmless.

    `release` is what its end calls.
    """

    __slots__ = ("_release", "released", "version")

    def __init__(self, version: AdapterVersion, release: Callable[["Lease"], None]) -> None:
        self.version = version
        self.released = False
        self._release = release

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._release(self)
