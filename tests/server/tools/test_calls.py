"""Reading calls: whole ones, broken ones, and in whatever pieces they come."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamic_lora_server.tools.calls import (
    CallArguments,
    CallBegin,
    FreeReader,
    GuidedReader,
    Reader,
    Words,
)
from dynamic_lora_server.tools.notation import HERMES, LLAMA3, MISTRAL, NOTATIONS, Notation

Found = tuple[str, list[tuple[str, str]]]
NAMES = frozenset({"f", "g.h"})
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text(), VALUES, max_size=3)


def read(reader: Reader, *pieces: str) -> Found:
    """The text and the calls in an answer that comes in pieces."""
    parts = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
    words: list[str] = []
    calls: list[tuple[str, str]] = []
    for part in parts:
        match part:
            case Words():
                words.append(part.text)
            case CallBegin():
                assert part.index == len(calls)
                assert part.id
                calls.append((part.name, ""))
            case CallArguments():
                assert part.index == len(calls) - 1
                calls[-1] = calls[-1][0], calls[-1][1] + part.text
    return "".join(words), calls


def free(notation: Notation, *pieces: str) -> Found:
    return read(FreeReader(notation, NAMES), *pieces)


def written(notation: Notation, calls: list[tuple[str, str]], space: str = "") -> str:
    """Calls as a model writes them."""
    objects = [
        f'{{"name": "{name}", "{notation.arguments}": {arguments}}}' for name, arguments in calls
    ]
    if notation.listed:
        return f"{notation.opening} [{', '.join(objects)}]"
    return space.join(f"{notation.opening}\n{one}\n{notation.closing}" for one in objects)


@pytest.mark.parametrize(
    ("notation", "text", "words", "calls"),
    [
        (HERMES, "hello ", "hello ", []),
        (HERMES, "", "", []),
        (HERMES, '<tool_call>{"name":"f"}</tool_call>', "", [("f", "{}")]),
        (
            HERMES,
            'I look.\n<tool_call>\n{"name": "f", "arguments": {"a": 1.50}}\n</tool_call>\n',
            "I look.",
            [("f", '{"a": 1.50}')],
        ),
        (
            HERMES,
            '<tool_call>{"arguments": {"é": "</tool_call>}\\""}, "name": "f"}</tool_call> done',
            "done",
            [("f", '{"é": "</tool_call>}\\""}')],
        ),
        (
            HERMES,  # a list in one pair of markers
            '<tool_call>[{"name":"f"}, {"name":"g.h","parameters":{}}]</tool_call>',
            "",
            [("f", "{}"), ("g.h", "{}")],
        ),
        (HERMES, '<tool_call>{"name":"f"}', "", [("f", "{}")]),  # an end token came first
        (HERMES, '<tool_call>{"name":"f"}</tool', "", [("f", "{}")]),
        (LLAMA3, ' {"name": "f", "parameters": {}}', "", [("f", "{}")]),
        (
            LLAMA3,
            '{"type": "function", "name": "f", "parameters": {}}; {"name": "g.h"}',
            "",
            [("f", "{}"), ("g.h", "{}")],
        ),
        (LLAMA3, 'So: {"name": "f", "parameters": {}}', 'So: {"name": "f", "parameters": {}}', []),
        (
            MISTRAL,
            '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abc"}, {"name": "g.h"}]',
            "",
            [("f", "{}"), ("g.h", "{}")],
        ),
        (MISTRAL, 'yes[TOOL_CALLS]{"name": "f"}', "yes", [("f", "{}")]),
    ],
)
def test_calls_and_the_text_beside_them(
    notation: Notation, text: str, words: str, calls: list[tuple[str, str]]
) -> None:
    assert free(notation, text) == (words, calls)
    assert free(notation, *text) == (words, calls)


@pytest.mark.parametrize(
    "broken",
    [
        "<tool_call>",
        "x <tool_",
        "<tool_call> soon",
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}',
        '<tool_call>{"name": "f", "arguments": []}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}, "parameters": {}}</tool_call>',
        '<tool_call>{"name": "f", "name": "f"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        "<tool_call>{'name': 'f'}</tool_call>",
        '<tool_call>{"name": "f"} and</tool_call>',
        '<tool_call>{"name": "f",}</tool_call>',
        '<tool_call>{"name": ["f"]}</tool_call>',
        '<tool_call>[{"name": "f"}, 1]</tool_call>',
        "<tool_call>[]</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 10**5 + "]" * 10**5 + "}}",
    ],
)
def test_what_is_no_call_is_text(broken: str) -> None:
    assert free(HERMES, broken) == (broken, [])
    after = ' <tool_call>{"name": "g.h"}</tool_call>'
    if "</tool_call>" in broken:
        assert free(HERMES, broken + after) == (broken, [("g.h", "{}")])


@pytest.mark.parametrize("broken", ['{"name": "x"}', '{"name": "f"', "{}", '{"a": 1} {"name":"f"}'])
def test_json_that_is_no_bare_call_is_text(broken: str) -> None:
    assert free(LLAMA3, broken) == (broken, [])
    assert free(LLAMA3, *broken) == (broken, [])


@given(
    notation=st.sampled_from(sorted(NOTATIONS)),
    before=st.text(),
    calls=st.lists(st.tuples(st.sampled_from(sorted(NAMES)), ARGUMENTS), min_size=1, max_size=3),
    ascii_only=st.booleans(),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_calls_come_through_any_pieces(
    notation: str,
    before: str,
    calls: list[tuple[str, Any]],
    ascii_only: bool,
    cuts: list[int],
) -> None:
    one = NOTATIONS[notation]
    texts = [(name, json.dumps(value, ensure_ascii=ascii_only)) for name, value in calls]
    before = before.replace("<", "").replace("[", "") if one.opening else ""
    text = before + written(one, texts, space="\n")
    pieces = pieces_of(text, cuts)
    assert free(one, *pieces) == (before.rstrip(), texts)
    assert read(GuidedReader(one), *pieces) == ("", texts)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    return [text[a:b] for a, b in zip(places, places[1:], strict=False)]


FRAGMENTS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", '{"name": "f"}', '{"name":"x"}', "[", "]", "{"]
    + ["}", '"', "\\", " ", "\n", ";", ",", "<tool", "_call>", "é", "a", '"arguments": {}']
)


@given(
    notation=st.sampled_from(sorted(NOTATIONS)),
    fragments=st.lists(FRAGMENTS, max_size=12),
    cuts=st.lists(st.integers(0, 80), max_size=8),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_reads_the_same_in_any_pieces(
    notation: str, fragments: list[str], cuts: list[int]
) -> None:
    text = "".join(fragments)
    one = NOTATIONS[notation]
    whole = free(one, text)
    assert free(one, *text) == whole
    assert free(one, *pieces_of(text, cuts)) == whole
    if not whole[1]:
        assert whole[0] == text
    assert read(GuidedReader(one), *text) == read(GuidedReader(one), text)


def test_arguments_that_a_grammar_guarantees_come_as_they_are_made() -> None:
    reader = GuidedReader(HERMES)
    assert reader.push('<tool_call>\n{"name": "f", "argum') == []
    begin, *more = reader.push('ents": {"a"')
    assert isinstance(begin, CallBegin)
    assert more == [CallArguments(0, '{"a"')]
    assert not reader.called
    assert reader.push(": 1}}\n</tool") == [CallArguments(0, ": 1}")]
    assert reader.called
    assert reader.finish() == []


def test_what_was_cut_off_before_a_name_is_text() -> None:
    text = '<tool_call>\n{"name": "f'
    assert read(GuidedReader(HERMES), text) == (text, [])


def test_the_ids_of_calls() -> None:
    assert HERMES.new_id() != HERMES.new_id()
    assert HERMES.new_id().startswith("call_")
    assert len(MISTRAL.new_id()) == 9
    assert MISTRAL.new_id().isalnum()
