"""What a value in `adapter_config.json` may be, as small composable checks. Imports no torch."""

import math
from collections.abc import Callable
from typing import Any

from dynamic_lora_adapters.lora.config_values import invalid

Check = Callable[[str, Any], None]
"""Takes a key and its value; raises `InvalidAdapter` naming the key."""


def integer(low: int, high: int) -> Check:
    """An integer from `low` to `high`, both included; no bool."""

    def check(key: str, value: Any) -> None:
        if type(value) is not int or not low <= value <= high:
            raise invalid(key, value, f"an integer from {low} to {high}")

    return check


def number(low: float, high: float) -> Check:
    """A finite number from `low` to `high`, both included; no bool."""

    def check(key: str, value: Any) -> None:
        sound = isinstance(value, int | float) and not isinstance(value, bool)
        # The comparison also refuses NaN and integers too large for a float.
        if not sound or not low <= value <= high or not math.isfinite(value):
            raise invalid(key, value, f"a number from {low:g} to {high:g}")

    return check


def boolean(key: str, value: Any) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise invalid(key, value, "true or false")


def one_of(*values: Any) -> Check:
    """One of `values`, of the same type."""

    def check(key: str, value: Any) -> None:
        if not any(type(value) is type(known) and value == known for known in values):
            raise invalid(key, value, f"one of {', '.join(map(repr, values))}")

    return check


def optional(inner: Check) -> Check:
    """Null, or what `inner` lets pass."""

    def check(key: str, value: Any) -> None:
        if value is not None:
            inner(key, value)

    return check


def pattern_map(inner: Check) -> Check:
    """An object from patterns of module paths to values that `inner` lets pass."""

    def check(key: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise invalid(key, value, "an object")
        for pattern, item in value.items():
            inner(f"{key}.{pattern}", item)

    return check


def names(key: str, value: Any) -> None:
    """A pattern, or a list of non-empty names; the list may be empty."""
    if isinstance(value, list) and all(isinstance(name, str) and name for name in value):
        return
    if not isinstance(value, str) or not value:
        raise invalid(key, value, "a string or a list of non-empty strings")


def text(key: str, value: Any) -> None:
    """A non-empty string."""
    if not isinstance(value, str) or not value:
        raise invalid(key, value, "a non-empty string")


def token_ids(key: str, value: Any) -> None:
    """A non-empty list of token ids, each once."""
    sound = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
    if not sound or not value or len(set(value)) != len(value):
        raise invalid(key, value, "a non-empty list of token ids, each once")
