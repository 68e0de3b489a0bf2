from typing import Any

import pytest

from dynamic_lora_adapters import InvalidAdapter
from dynamic_lora_adapters.lora.config_values import (
    check_pattern,
    invalid,
    is_unset,
    read_bool,
    read_indices,
    read_list,
    read_mapping,
    read_names,
    read_text,
    read_token_indices,
    refusal,
)


def test_absent_and_null_read_alike() -> None:
    config: dict[str, Any]
    for config in ({}, {"k": None}):
        assert read_bool(config, "k") is False
        assert read_text(config, "k") is None
        assert read_names(config, "k") is None
        assert read_list(config, "k") == ()
        assert read_mapping(config, "k") == {}
        assert read_token_indices(config, "k") == ()
    assert read_indices("k", None) == ()


def test_values_are_read() -> None:
    assert read_bool({"k": True}, "k")
    assert read_text({"k": "x"}, "k") == "x"
    assert read_names({"k": ["a", "b"]}, "k") == ("a", "b")
    assert read_names({"k": "a.*"}, "k") == "a.*"
    assert read_list({"k": ["a"]}, "k") == ("a",)
    assert read_indices("k", 3) == (3,)
    assert read_token_indices({"k": [2, 1]}, "k") == (("", (2, 1)),)
    assert read_token_indices({"k": {"a": [2], "b": []}}, "k") == (("a", (2,)),)


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        (read_bool, 1, "k must be true or false, not 1"),
        (read_text, 1, "k must be a string or null, not 1"),
        (read_names, [1], r"k must be a string or a list of non-empty strings, not \[1\]"),
        (read_list, "a", "k must be a list of non-empty strings, not 'a'"),
        (read_mapping, [], r"k must be an object, not \[\]"),
        (read_token_indices, {"a": [1, 1]}, "k lists a token twice"),
        (read_token_indices, [True], "k must be an integer from 0, or a list of them, not True"),
    ],
)
def test_wrong_types_are_refused(read: Any, value: object, message: str) -> None:
    with pytest.raises(InvalidAdapter, match=message) as caught:
        read({"k": value}, "k")
    assert caught.value.field == "k"


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_unset(value: object) -> None:
    assert is_unset(value)


@pytest.mark.parametrize("value", [0, True, "x", [None]])
def test_set(value: object) -> None:
    assert not is_unset(value)


def test_errors_show_no_novel() -> None:
    shown = "'" + "x" * 76 + "..."
    assert refusal("k", "x" * 500, "it is long").message == (
        f"k = {shown} is not served: it is long."
    )
    assert invalid("k", "x" * 500, "short").message == f"k must be short, not {shown}."
    assert invalid("k", "x" * 78, "short").message == f"k must be short, not '{'x' * 78}'."
    with pytest.raises(InvalidAdapter) as caught:
        check_pattern("k", "(" + "x" * 1000)
    assert len(caught.value.message) < 200


def test_patterns() -> None:
    check_pattern("k", r"a\.b")
    with pytest.raises(InvalidAdapter, match=r"'\(' in k is not a regular expression"):
        check_pattern("k", "(")
    with pytest.raises(InvalidAdapter, match="A pattern in k is longer than 2000 characters"):
        check_pattern("k", "a" * 2001)
