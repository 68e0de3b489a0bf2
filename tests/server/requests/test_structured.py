"""Which of a request's fields say what its answer must be like."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.generation import Grammar, GrammarKind
from dynamic_lora_server.requests.structured import generate_grammar, openai_grammar
from dynamic_lora_server.schemas.generate import GenerateParameters
from dynamic_lora_server.schemas.openai import CompletionRequest

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"const": "é"}}}
TEXT = json.dumps(SCHEMA, ensure_ascii=False)
ANY = '{"type": "object"}'
NAMED = {"name": "it", "schema": SCHEMA, "strict": True}


def of_v1(**fields: Any) -> Grammar | None:
    body = {"model": "base", "prompt": "x", **fields}
    return openai_grammar(CompletionRequest.model_validate(body))


def of_generate(**fields: Any) -> Grammar | None:
    return generate_grammar(GenerateParameters.model_validate(fields))


@pytest.mark.parametrize(
    ("fields", "kind", "source", "field"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": NAMED}},
            GrammarKind.JSON_SCHEMA,
            TEXT,
            "response_format",
        ),
        (
            {"response_format": {"type": "json_object"}},
            GrammarKind.JSON_SCHEMA,
            ANY,
            "response_format",
        ),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            GrammarKind.JSON_SCHEMA,
            TEXT,
            "response_format",
        ),
        *(
            ({"response_format": asked}, kind, source, "response_format")
            for asked, kind, source in (
                ({"type": "json_object", "value": SCHEMA}, GrammarKind.JSON_SCHEMA, TEXT),
                ({"type": "json", "value": SCHEMA}, GrammarKind.JSON_SCHEMA, TEXT),
                ({"type": "json", "value": TEXT}, GrammarKind.JSON_SCHEMA, TEXT),
                ({"type": "json_schema", "value": NAMED}, GrammarKind.JSON_SCHEMA, TEXT),
                ({"type": "regex", "value": "a+"}, GrammarKind.REGEX, "a+"),
            )
        ),
        (
            {"structured_outputs": {"json": SCHEMA}},
            GrammarKind.JSON_SCHEMA,
            TEXT,
            "structured_outputs.json",
        ),
        (
            {"structured_outputs": {"json_object": True}},
            GrammarKind.JSON_SCHEMA,
            ANY,
            "structured_outputs.json_object",
        ),
        (
            {"structured_outputs": {"regex": "a+", "json": None}},
            GrammarKind.REGEX,
            "a+",
            "structured_outputs.regex",
        ),
        (
            {"structured_outputs": {"choice": ["yes", "no"]}},
            GrammarKind.CHOICE,
            '["yes", "no"]',
            "structured_outputs.choice",
        ),
        (
            {"structured_outputs": {"grammar": 'start: "a"'}},
            GrammarKind.RULES,
            'start: "a"',
            "structured_outputs.grammar",
        ),
        ({"guided_json": TEXT}, GrammarKind.JSON_SCHEMA, TEXT, "guided_json"),
        ({"guided_regex": "a"}, GrammarKind.REGEX, "a", "guided_regex"),
        ({"guided_choice": ["a"]}, GrammarKind.CHOICE, '["a"]', "guided_choice"),
        ({"guided_grammar": "x"}, GrammarKind.RULES, "x", "guided_grammar"),
    ],
)
def test_below_v1(fields: dict[str, Any], kind: GrammarKind, source: str, field: str) -> None:
    assert of_v1(**fields) == Grammar(kind, source, field)


@pytest.mark.parametrize(
    ("fields", "kind", "source", "field"),
    [
        (
            {"grammar": {"type": "json", "value": SCHEMA}},
            GrammarKind.JSON_SCHEMA,
            TEXT,
            "parameters.grammar",
        ),
        (
            {"grammar": {"type": "json", "value": ANY}},
            GrammarKind.JSON_SCHEMA,
            ANY,
            "parameters.grammar",
        ),
        (
            {"grammar": {"type": "regex", "value": "[0-9]"}},
            GrammarKind.REGEX,
            "[0-9]",
            "parameters.grammar",
        ),
        (
            {"grammar": {"type": "json_schema", "value": {"name": "it", "schema": SCHEMA}}},
            GrammarKind.JSON_SCHEMA,
            TEXT,
            "parameters.grammar",
        ),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            GrammarKind.JSON_SCHEMA,
            TEXT,
            "parameters.response_format",
        ),
    ],
)
def test_of_generate(fields: dict[str, Any], kind: GrammarKind, source: str, field: str) -> None:
    assert of_generate(**fields) == Grammar(kind, source, field)


def test_nothing_is_asked_for() -> None:
    assert of_v1() is None
    assert of_v1(response_format=None, structured_outputs=None, guided_json=None) is None
    assert of_v1(response_format={"type": "text"}) is None
    assert of_generate(grammar=None, response_format={"type": "text"}) is None


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_object", "json_schema": NAMED}},
            "response_format.json_schema",
        ),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "text", "value": {}}}, "response_format.value"),
        ({"response_format": {"type": "json"}}, "response_format.value"),
        ({"response_format": {"type": "regex", "schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "regex", "value": {}}}, "response_format.value"),
        (
            {"response_format": {"type": "json_object", "schema": {}, "value": {}}},
            "response_format.value",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "guided_regex"),
    ],
)
def test_fields_that_contradict_each_other(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        of_v1(**fields)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"grammar": {"type": "regex", "value": {}}}, "parameters.grammar.value"),
        ({"grammar": {"type": "json_schema", "value": SCHEMA}}, "parameters.grammar.value"),
        ({"grammar": {"type": "json_schema", "value": "{}"}}, "parameters.grammar.value"),
        (
            {
                "grammar": {"type": "json", "value": {}},
                "response_format": {"type": "json_object"},
            },
            "parameters.response_format",
        ),
    ],
)
def test_parameters_that_say_it_badly(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        of_generate(**fields)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "it"}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"lark": "x"}}, "structured_outputs.lark"),
        ({"guided_decoding_backend": "x"}, "guided_decoding_backend"),
    ],
)
def test_what_is_not_there(fields: dict[str, Any], place: str) -> None:
    with pytest.raises(ValidationError) as caught:
        of_v1(**fields)
    (error,) = caught.value.errors()
    assert ".".join(map(str, error["loc"])) == place


def test_a_schema_that_is_nested_too_deeply() -> None:
    schema: dict[str, Any] = {}
    for _ in range(10**5):
        schema = {"not": schema}
    with pytest.raises(InvalidParameter, match="nested too deeply"):
        of_v1(guided_json=schema)
