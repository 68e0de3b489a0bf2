"""Strict reading of an adapter's JSON files.

Python's own reader keeps the last of two equal keys and accepts NaN: both would
let a file mean one thing to the person who checked it and another to the server.
"""

import json
from pathlib import Path
from typing import Any, NoReturn

from dynamic_lora_adapters.errors import InvalidAdapter

_MAX_KEY_SHOWN = 80
MAX_JSON_BYTES = 1 << 20


class DuplicateKey(ValueError):
    """A JSON object that has one key twice; the message names it."""


def read_json_object(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read one JSON object from a file.

    Raises `InvalidAdapter`, with the file's name as its field, when the file is
    missing, over `max_bytes`, not UTF-8, not JSON, not an object, or holds a repeated
    key, half a surrogate pair, NaN or an infinity.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except FileNotFoundError:
        raise InvalidAdapter(
            f"{path.name} is missing.",
            field=path.name,
            fix="Upload every file that PEFT's save_pretrained wrote.",
        ) from None
    return parse_json_object(data, path.name, max_bytes=max_bytes)


def parse_json_object(data: bytes, name: str, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Parse one JSON object; `name` is what the errors call the document."""
    if len(data) > max_bytes:
        raise InvalidAdapter(f"{name} is larger than {max_bytes} bytes.", field=name)
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        _refuse_half_characters(value, name)
    except UnicodeDecodeError as error:
        raise InvalidAdapter(f"{name} is not UTF-8: {error}.", field=name) from None
    except RecursionError:
        raise InvalidAdapter(f"{name} is nested too deeply.", field=name) from None
    except ValueError as error:
        raise InvalidAdapter(f"{name} is not valid JSON: {error}.", field=name) from None
    if not isinstance(value, dict):
        raise InvalidAdapter(f"{name} must hold a JSON object.", field=name)
    return value


def _refuse_half_characters(value: object, name: str) -> None:
    """JSON can escape half of a surrogate pair, which no answer or index could hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise InvalidAdapter(
            f"{name} holds {half!r}, which is half of a character.", field=name
        ) from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` of a reader that takes each key once; else raises DuplicateKey."""
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKey(f"the key {key[:_MAX_KEY_SHOWN]!r} appears twice")
            seen.add(key)
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number that JSON allows")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large")
    return value
