"""Strict reading of the server's JSON documents."""

import json
from collections.abc import Mapping
from typing import Any, Self

from dynamic_lora_client.errors import InvalidResponse


class Document:
    """A JSON object whose fields are read by type.

    Each reader raises InvalidResponse, naming the field, where the value is
    missing or of another type; the `optional_` ones take a missing field and
    null for None.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """Read a JSON object. Raises InvalidResponse for anything else."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            raise InvalidResponse("The server's answer is not JSON.") from None
        return cls.of(values)

    @classmethod
    def of(cls, values: object) -> Self:
        """Wrap a JSON value that must be an object."""
        if not isinstance(values, dict):
            raise InvalidResponse("The server's answer is not a JSON object.")
        return cls(values)

    def text(self, key: str) -> str:
        """A string."""
        value = self.values.get(key)
        if not isinstance(value, str):
            raise _unlike(key, "a string")
        return value

    def optional_text(self, key: str) -> str | None:
        """A string or None."""
        return None if self.values.get(key) is None else self.text(key)

    def integer(self, key: str) -> int:
        """A whole number."""
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise _unlike(key, "an integer")
        return value

    def optional_integer(self, key: str) -> int | None:
        """A whole number or None."""
        return None if self.values.get(key) is None else self.integer(key)

    def optional_number(self, key: str) -> float | None:
        """A number or None."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise _unlike(key, "a number")
        return value

    def boolean(self, key: str) -> bool:
        """True or false."""
        value = self.values.get(key)
        if not isinstance(value, bool):
            raise _unlike(key, "a boolean")
        return value

    def flag(self, key: str) -> bool:
        """True or false; a missing one is false."""
        return self.values.get(key) is not None and self.boolean(key)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; a missing one is empty."""
        value = self.values.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise _unlike(key, "a list of strings")
        return tuple(value)

    def texts_and_integers(self, key: str) -> tuple[str | int, ...]:
        """A list of strings and whole numbers; a missing one is empty."""
        value = self.values.get(key) or []
        if not isinstance(value, list) or any(type(item) not in (str, int) for item in value):
            raise _unlike(key, "a list of strings and integers")
        return tuple(value)

    def children(self, key: str) -> list["Document"]:
        """A list of objects; a missing one is empty."""
        value = self.values.get(key) or []
        if not isinstance(value, list):
            raise _unlike(key, "a list")
        return [Document.of(item) for item in value]

    def child_lists(self, key: str) -> list[list["Document"]]:
        """A list of lists of objects; a missing one is empty."""
        value = self.values.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, list) for item in value):
            raise _unlike(key, "a list of lists")
        return [[Document.of(item) for item in items] for items in value]

    def child(self, key: str) -> "Document | None":
        """An object or None."""
        value = self.values.get(key)
        return None if value is None else Document.of(value)


def _unlike(key: str, wanted: str) -> InvalidResponse:
    return InvalidResponse(f"The server's answer has no {key!r} that is {wanted}.")
