import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamic_lora_adapters import InvalidAdapter, TaskCard

FULL: dict[str, Any] = {
    "description": "Finds names.",
    "prompt_template": 'Answer as JSON {"a": []}.\n{input}\n',
    "parameters": {
        "max_new_tokens": 64,
        "temperature": 0,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "stop": ["\n"],
        "do_sample": True,
        "seed": 7,
        "ignore_eos": False,
    },
    "example": {"input": "a", "output": "b"},
    "base_model": "org/model",
    "metrics": {"f1": 0.5, "n": 3},
    "dataset": "d",
    "license": "l",
    "attribution": "a",
}


def read(folder: Path, content: object) -> TaskCard | None:
    (folder / "task.json").write_text(json.dumps(content))
    return TaskCard.read(folder)


def test_a_full_card_is_kept_whole(tmp_path: Path) -> None:
    card = read(tmp_path, FULL)
    assert card is not None
    assert card.model_dump() == FULL


def test_no_card(tmp_path: Path) -> None:
    assert TaskCard.read(tmp_path) is None


def test_an_empty_card_has_no_defaults(tmp_path: Path) -> None:
    card = read(tmp_path, {})
    assert card is not None
    assert set(card.parameters.model_dump().values()) == {None}


@given(st.text(), st.text().filter(lambda t: "{input}" not in t))
def test_rendering_puts_the_text_in_verbatim(text: str, before: str) -> None:
    card = TaskCard(prompt_template=before + "<{input}>")
    assert card.render(text) == f"{before}<{text}>"
    assert TaskCard().render(text) == text


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"prompt_template": "no place"}, "prompt_template", "exactly once, not 0 times"),
        ({"prompt_template": "{input}{input}"}, "prompt_template", "exactly once, not 2 times"),
        ({"parameters": {"temperature": -1}}, "parameters.temperature", "greater than or equal"),
        ({"parameters": {"temperature": 101}}, "parameters.temperature", "less than or equal"),
        ({"parameters": {"top_k": 2**31}}, "parameters.top_k", "less than 2147483648"),
        ({"parameters": {"max_new_tokens": 2**31}}, "parameters.max_new_tokens", "less than"),
        ({"parameters": {"stop": ["x"] * 33}}, "parameters.stop", "at most 32 items"),
        ({"parameters": {"top_p": 0}}, "parameters.top_p", "greater than 0"),
        ({"parameters": {"top_k": "5"}}, "parameters.top_k", "valid integer"),
        ({"parameters": {"top_k": True}}, "parameters.top_k", "valid integer"),
        ({"parameters": {"stop": "x"}}, "parameters.stop", "valid list"),
        ({"parameters": {"stop": [""]}}, "parameters.stop.0", "at least 1 character"),
        ({"parameters": {"typical_p": 1}}, "parameters.typical_p", "not permitted"),
        ({"metrics": {"f1": "high"}}, "metrics.f1", "valid number"),
        ({"example": {"input": "x"}}, "example.output", "required"),
        ({"titel": "x"}, "titel", "not permitted"),
    ],
)
def test_wrong_fields_are_named(
    tmp_path: Path, change: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(InvalidAdapter, match=message) as caught:
        read(tmp_path, FULL | change)
    assert caught.value.field == f"task.json: {field}"


def test_broken_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text("{")
    with pytest.raises(InvalidAdapter, match=r"task\.json is not valid JSON"):
        TaskCard.read(tmp_path)
