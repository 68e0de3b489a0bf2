"""Everything that can be wrong with an adapter.

AdapterError
├── InvalidAdapter            the files are broken or unsafe
│   ├── UnsafeArchive         traversal, links, bombs, pickles
│   └── AdapterTooLarge       over the size cap
├── UnsupportedAdapter        a kind or a config key that is not served
├── IncompatibleAdapter       sound, but made for another base model
├── InvalidAdapterName        a name that cannot be a task name
├── AdapterNotFound           no adapter of that name
├── AdapterCapacityError      does not fit in the device's byte budget
└── StoreFailed               the folder of adapters cannot be written or read

Imports no torch.
"""

from collections.abc import Sequence


class AdapterError(Exception):
    """Base of all errors of this package.

    `field` names the config key, file or tensor at fault; `fix` says in one
    sentence what the caller can do.
    """

    def __init__(self, message: str, *, field: str | None = None, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.fix = fix


class InvalidAdapter(AdapterError):
    """The adapter's files are missing, malformed or hold impossible values."""


class UnsafeArchive(InvalidAdapter):
    """The upload would escape its folder, exhaust the disk or run code."""


class AdapterTooLarge(InvalidAdapter):
    """The upload is larger than the server accepts."""


class UnsupportedAdapter(AdapterError):
    """The adapter uses a PEFT feature that changes the result and is not served."""


class IncompatibleAdapter(AdapterError):
    """The adapter was trained for a base model of another name or shape."""


class InvalidAdapterName(AdapterError):
    """The name is empty, too long, or holds characters that a URL or shell would mangle."""


class AdapterNotFound(AdapterError):
    """No adapter has the name; `near` lists the closest names that exist."""

    def __init__(self, name: str, near: Sequence[str] = ()) -> None:
        hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
        super().__init__(
            f"No adapter is named {name!r}.{hint}",
            field="adapter",
            fix="List the names with GET /adapters, or upload it with POST /adapters.",
        )
        self.name = name
        self.near = tuple(near)


class AdapterCapacityError(AdapterError):
    """The adapter alone needs more device memory than adapters may use."""


class StoreFailed(AdapterError):
    """The disk is full or read-only, or the index's database does not answer."""
