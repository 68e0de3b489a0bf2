"""What an answer must be like, out of the several fields by which a request can say it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.generation import Grammar, GrammarKind
from dynamic_lora_server.schemas.generate import GenerateParameters
from dynamic_lora_server.schemas.structured import (
    ResponseFormat,
    StructuredOutputs,
    StructuredRequest,
    TgiGrammar,
)

_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
# The fields of a response format that say more of its type.
_SAID_IN: Mapping[str, Sequence[str]] = {
    "text": (),
    "json_object": ("schema", "value"),
    "json_schema": ("json_schema", "value"),
    "json": ("value",),
    "regex": ("value",),
}
_SAY_ENOUGH = ("text", "json_object")  # types that need none of them


def openai_grammar(body: StructuredRequest) -> Grammar | None:
    """What a body below `/v1` asks for.

    Raises InvalidParameter where two fields ask for something, or one for nothing that there is.
    """
    guided = {
        "guided_json": (GrammarKind.JSON_SCHEMA, body.guided_json),
        "guided_regex": (GrammarKind.REGEX, body.guided_regex),
        "guided_choice": (GrammarKind.CHOICE, body.guided_choice),
        "guided_grammar": (GrammarKind.RULES, body.guided_grammar),
    }
    return _only(
        _of_format(body.format_field, body.response_format),
        _of_outputs("structured_outputs", body.structured_outputs),
        *(_grammar(kind, value, field) for field, (kind, value) in guided.items()),
    )


def generate_grammar(own: GenerateParameters) -> Grammar | None:
    """What the parameters of `/generate` ask for. Raises as `openai_grammar` does."""
    return _only(
        None if own.grammar is None else _of_tgi("parameters.grammar", own.grammar),
        _of_format("parameters.response_format", own.response_format),
    )


def _of_format(field: str, asked: ResponseFormat | None) -> Grammar | None:
    if asked is None:
        return None
    _check_format(field, asked)
    if asked.value is not None:
        return _of_tgi(field, asked)
    if asked.json_schema is not None:
        return _grammar(GrammarKind.JSON_SCHEMA, asked.json_schema.schema_, field)
    if asked.type == "text":
        return None
    schema = _ANY_OBJECT if asked.schema_ is None else asked.schema_
    return _grammar(GrammarKind.JSON_SCHEMA, schema, field)


def _check_format(field: str, asked: ResponseFormat) -> None:
    """Raise InvalidParameter unless a type comes with what says more of it, and with that once."""
    given = {"json_schema": asked.json_schema, "schema": asked.schema_, "value": asked.value}
    names = [name for name, value in given.items() if value is not None]
    taken = _SAID_IN[asked.type]
    for name in names:
        if name not in taken:
            raise InvalidParameter(
                f"{name} says nothing of the type {asked.type}.",
                field=f"{field}.{name}",
                fix=f"Leave {name} out, or set type to "
                f"{' or '.join(kind for kind, names in _SAID_IN.items() if name in names)}.",
            )
    if len(names) > 1:
        raise InvalidParameter(
            f"{names[0]} and {names[1]} both say what the answer must be like.",
            field=f"{field}.{names[1]}",
            fix="Give one of the two.",
        )
    if not names and asked.type not in _SAY_ENOUGH:
        raise InvalidParameter(
            f"The type {asked.type} needs {taken[0]}, which says more of it.",
            field=f"{field}.{taken[0]}",
            fix=f"Add {taken[0]}.",
        )


def _of_outputs(field: str, asked: StructuredOutputs | None) -> Grammar | None:
    if asked is None:
        return None
    given = {
        "json": (GrammarKind.JSON_SCHEMA, asked.json_),
        "json_object": (GrammarKind.JSON_SCHEMA, _ANY_OBJECT if asked.json_object else None),
        "regex": (GrammarKind.REGEX, asked.regex),
        "choice": (GrammarKind.CHOICE, asked.choice),
        "grammar": (GrammarKind.RULES, asked.grammar),
    }
    found = _only(
        *(_grammar(kind, value, f"{field}.{name}") for name, (kind, value) in given.items())
    )
    if found is None:
        raise InvalidParameter(
            f"{field} asks for nothing.", field=field, fix=f"Give one of {', '.join(given)}."
        )
    return found


def _of_tgi(field: str, asked: TgiGrammar | ResponseFormat) -> Grammar | None:
    value = asked.value
    match asked.type:
        case "regex":
            if isinstance(value, str):
                return _grammar(GrammarKind.REGEX, value, field)
            raise InvalidParameter("The value of a regex is a text.", field=f"{field}.value")
        case "json_schema":
            schema = value.get("schema") if isinstance(value, dict) else None
            if isinstance(schema, dict):
                return _grammar(GrammarKind.JSON_SCHEMA, schema, field)
            raise InvalidParameter(
                "The value of a json_schema is an object with the schema as its schema.",
                field=f"{field}.value",
            )
        case _:
            return _grammar(GrammarKind.JSON_SCHEMA, value, field)


def _grammar(
    kind: GrammarKind, value: str | Mapping[str, Any] | Sequence[str] | None, field: str
) -> Grammar | None:
    if value is None:
        return None
    return Grammar(kind, value if isinstance(value, str) else _as_text(value, field), field)


def _as_text(value: object, field: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise InvalidParameter(f"{field} is nested too deeply.", field=field) from None


def _only(*found: Grammar | None) -> Grammar | None:
    """The one that there is, if any."""
    there = [one for one in found if one is not None]
    if len(there) > 1:
        raise InvalidParameter(
            f"{there[0].field} and {there[1].field} both say what the answer must be like.",
            field=there[1].field,
            fix="Give one of the two.",
        )
    return there[0] if there else None
