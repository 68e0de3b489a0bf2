"""JSON in a text that grows: where a value ends, and what the members of an object are."""

import json
import re
from typing import Any, NoReturn

_SPACE = re.compile(r"[ \t\r\n]*")
_STRUCTURE = re.compile(r'["\\{}\[\]]')


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


class ValueEnd:
    """Looks for the end of the object or list that begins at a place of a text.

    It counts brackets outside of strings, and reads no character twice.
    """

    def __init__(self, begin: int = 0) -> None:
        self._at = begin
        self._depth = 0
        self._in_string = False

    def find(self, text: str) -> int | None:
        """The place behind the value, None while it goes on; `text` has only grown since."""
        while (found := _STRUCTURE.search(text, self._at)) is not None:
            self._at = found.end()
            match found[0]:
                case "\\":
                    if self._at == len(text):
                        self._at -= 1  # what it escapes has not come yet
                        return None
                    self._at += 1
                case '"':
                    self._in_string = not self._in_string
                case bracket if not self._in_string:
                    self._depth += 1 if bracket in "{[" else -1
                    if self._depth <= 0:
                        return self._at
        self._at = len(text)
        return None


def members(text: str) -> dict[str, tuple[Any, str]]:
    """An object's values, each with the text that it was read from.

    Raises ValueError for what is no JSON object, or has a key twice.
    """
    found: dict[str, tuple[Any, str]] = {}
    at = _after(text, _skip(text, 0), "{")
    at = _skip(text, at)
    if text[at : at + 1] == "}":
        at += 1
    else:
        at = _read_members(text, at, found)
    if _skip(text, at) != len(text):
        raise ValueError("more than an object")
    return found


def _read_members(text: str, at: int, found: dict[str, tuple[Any, str]]) -> int:
    while True:
        key, at = _value(text, _skip(text, at))
        if not isinstance(key, str) or key in found:
            raise ValueError("no new key")
        start = _skip(text, _after(text, _skip(text, at), ":"))
        value, at = _value(text, start)
        found[key] = value, text[start:at]
        at = _skip(text, at)
        if text[at : at + 1] != ",":
            return _after(text, at, "}")
        at += 1


def items(text: str) -> list[str]:
    """The texts of a list's items. Raises ValueError for what is no JSON list."""
    found: list[str] = []
    at = _skip(text, _after(text, _skip(text, 0), "["))
    while text[at : at + 1] != "]":
        if found:
            at = _skip(text, _after(text, at, ","))
        _, end = _value(text, at)
        found.append(text[at:end])
        at = _skip(text, end)
    if _skip(text, at + 1) != len(text):
        raise ValueError("more than a list")
    return found


def _value(text: str, at: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return at if match is None else match.end()


def _after(text: str, at: int, symbol: str) -> int:
    if text[at : at + 1] != symbol:
        raise ValueError(f"no {symbol} at {at}")
    return at + 1
