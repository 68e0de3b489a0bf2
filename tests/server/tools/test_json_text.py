"""Where a value ends in a text that grows, and what an object's members are."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamic_lora_server.tools.json_text import ValueEnd, items, members
from tests.server.tools.test_calls import ARGUMENTS, VALUES


@given(value=ARGUMENTS | st.lists(VALUES), behind=st.text(), indent=st.none() | st.just(1))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_end_is_found_wherever_the_text_is_cut(
    value: Any, behind: str, indent: int | None
) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    search = ValueEnd(begin=1)
    whole = f" {text}{behind}"
    ends = [search.find(whole[:length]) for length in range(1, len(whole) + 1)]
    assert all(end is None for end in ends[: len(text)])
    assert ends[len(text)] == len(text) + 1


@given(value=ARGUMENTS, indent=st.none() | st.integers(0, 2))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_members_and_items(value: dict[str, Any], indent: int | None) -> None:
    text = json.dumps(value, indent=indent)
    found = members(text)
    assert {key: one for key, (one, _) in found.items()} == value
    assert {key: json.loads(source) for key, (_, source) in found.items()} == value
    listed = json.dumps(list(value.values()), indent=indent)
    assert [json.loads(one) for one in items(listed)] == list(value.values())


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "1", '{"a"}', '{"a":}', '{"a":1,}', "{} x", '{"a":1 "b":2}', "{1:2}"]
)
def test_what_is_no_object(text: str) -> None:
    with pytest.raises(ValueError):
        members(text)


@pytest.mark.parametrize("text", ["", "[", "{}", "[1,]", "[,1]", "[1 2]", "[1] 2", "[NaN]"])
def test_what_is_no_list(text: str) -> None:
    with pytest.raises(ValueError):
        items(text)
