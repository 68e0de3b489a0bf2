"""Reading single values of `adapter_config.json`, each with its type checked."""

import re
from collections.abc import Mapping
from typing import Any

from dynamic_lora_adapters.errors import InvalidAdapter, UnsupportedAdapter

_MAX_PATTERN_LENGTH = 2000
_MAX_SHOWN = 80

Config = Mapping[str, Any]


def refusal(key: str, value: object, reason: str) -> UnsupportedAdapter:
    """The error for a key that changes the result and is not served."""
    return UnsupportedAdapter(
        f"{key} = {shown(value)} is not served: {reason}.",
        field=key,
        fix=f"Train the adapter without {key}.",
    )


def invalid(key: str, value: object, expected: str) -> InvalidAdapter:
    """The error for a value that no PEFT release would accept."""
    return InvalidAdapter(f"{key} must be {expected}, not {shown(value)}.", field=key)


def shown(value: object) -> str:
    """A value as messages show it: its `repr`, cut off after 80 characters."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def is_unset(value: object) -> bool:
    """Whether a key with this value might as well be absent."""
    return value is None or value is False or value in ("", [], {})


def read_bool(config: Config, key: str) -> bool:
    """True or false; false where the key is absent or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise invalid(key, value, "true or false")
    return bool(value)


def read_text(config: Config, key: str) -> str | None:
    """A string; None where the key is absent, null or empty."""
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise invalid(key, value, "a string or null")
    return value or None


def read_names(config: Config, key: str) -> tuple[str, ...] | str | None:
    """A list of names as a tuple, or a string as it is; None where there is neither."""
    value = config.get(key)
    if isinstance(value, list) and all(isinstance(name, str) and name for name in value):
        return tuple(value) or None
    if value is not None and not isinstance(value, str):
        raise invalid(key, value, "a string or a list of non-empty strings")
    return value or None


def read_list(config: Config, key: str) -> tuple[str, ...]:
    """A list of names; empty where the key is absent or null."""
    names = read_names(config, key)
    if isinstance(names, str):
        raise invalid(key, names, "a list of non-empty strings")
    return names or ()


def read_mapping(config: Config, key: str) -> dict[str, Any]:
    """An object; empty where the key is absent or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise invalid(key, value, "an object")
    return value or {}


def read_indices(key: str, value: object) -> tuple[int, ...]:
    """An integer from 0 or a list of them; empty for null."""
    indices = value if isinstance(value, list) else [] if value is None else [value]
    for index in indices:
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise invalid(key, index, "an integer from 0, or a list of them")
    return tuple(indices)


def read_token_indices(config: Config, key: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Token ids by layer name; a bare list is for the token embedding, whose name is "" here."""
    value = config.get(key)
    layers = value if isinstance(value, dict) else {"": value}
    found = tuple((name, read_indices(key, ids)) for name, ids in layers.items())
    for _, ids in found:
        if len(set(ids)) != len(ids):
            raise InvalidAdapter(f"{key} lists a token twice.", field=key)
    return tuple((name, ids) for name, ids in found if ids)


def check_pattern(key: str, pattern: str) -> None:
    """Raise `InvalidAdapter` unless `pattern` is a regular expression of sane length."""
    if len(pattern) > _MAX_PATTERN_LENGTH:
        raise InvalidAdapter(
            f"A pattern in {key} is longer than {_MAX_PATTERN_LENGTH} characters.", field=key
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InvalidAdapter(
            f"{shown(pattern)} in {key} is not a regular expression: {error}.", field=key
        ) from None
