import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamic_lora_adapters.errors import InvalidAdapter
from dynamic_lora_adapters.files.json_file import (
    MAX_JSON_BYTES,
    parse_json_object,
    read_json_object,
)

_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)  # fmt: skip


@given(st.dictionaries(st.text(), _JSON))
def test_reads_what_json_writes(value: dict[str, Any]) -> None:
    assert parse_json_object(json.dumps(value).encode(), "x.json") == value


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_by_name(data: bytes) -> None:
    try:
        assert isinstance(parse_json_object(data, "x.json"), dict)
    except InvalidAdapter as error:
        assert error.field == "x.json"
        assert "x.json" in error.message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"r": 1, "r": 2}', "the key 'r' appears twice"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' appears twice"),
        (b'{"%s": 1, "%s": 2}' % (b"k" * 999, b"k" * 999), "the key 'k{80}' appears twice"),
        (b'{"a": ["\\ud800"]}', r"holds '\\ud800', which is half of a character"),
        (b'{"\\udc00": 1}', r"holds '\\udc00', which is half of a character"),
        (b'{"a": NaN}', "NaN is not a number that JSON allows"),
        (b'{"a": -Infinity}', "-Infinity is not a number that JSON allows"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b'{"a": ', "not valid JSON"),
        (b"\xff{}", "not UTF-8"),
        (b"[1]", "must hold a JSON object"),
        (b'{"a":' + b"[" * 200_000, "nested too deeply"),
        (b" " * (MAX_JSON_BYTES + 1), "larger than 1048576 bytes"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_refuses(data: bytes, message: str) -> None:
    with pytest.raises(InvalidAdapter, match=message):
        parse_json_object(data, "x.json")


@pytest.mark.parametrize("depth", range(850, 1000))
def test_any_depth_is_read_or_refused(depth: int) -> None:
    """Reading and writing do not give up at quite the same depth."""
    try:
        parse_json_object(b'{"a":' + b"[" * depth + b"]" * depth + b"}", "x.json")
    except InvalidAdapter as error:
        assert "nested too deeply" in error.message


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match="adapter_config.json is missing") as caught:
        read_json_object(tmp_path / "adapter_config.json")
    assert caught.value.fix is not None
