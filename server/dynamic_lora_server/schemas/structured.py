"""What an answer must be like, on the wire: in OpenAI's, vLLM's, TGI's and LoRAX's fields."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from dynamic_lora_server.schemas._base import (
    JsonObject,
    Neutral,
    NonEmptyText,
    Text,
    UnsetOrFalse,
    Wire,
)

_Choices = Annotated[list[NonEmptyText], Field(min_length=1, max_length=1000)]
_VALUE = (
    "Of `regex` the expression, of `json_schema` an object with `schema`, of the other types of "
    "JSON the schema or its text."
)


class NamedSchema(Wire):
    """A JSON schema under a name, which changes nothing."""

    name: Text | None = None
    description: Text | None = None
    schema_: JsonObject = Field(alias="schema", description="A JSON schema.")
    strict: bool | None = Field(default=None, description="Changes nothing: a schema is kept to.")


class ResponseFormat(Wire):
    """Any text, any JSON object, JSON of a schema, or, as TGI has it, what a `value` says."""

    type: Literal["text", "json_object", "json_schema", "json", "regex"]
    json_schema: NamedSchema | None = Field(default=None, description="With that type alone.")
    schema_: JsonObject | None = Field(
        default=None, alias="schema", description="With `json_object`, as LoRAX has it."
    )
    value: JsonObject | NonEmptyText | None = Field(
        default=None, description=f"As TGI and the Hub's client have it. {_VALUE}"
    )


class StructuredOutputs(Wire):
    """vLLM's: one of these."""

    json_: JsonObject | NonEmptyText | None = Field(
        default=None, alias="json", description="A JSON schema, or the text of one."
    )
    json_object: bool | None = Field(default=None, description="Any JSON object.")
    regex: NonEmptyText | None = Field(default=None, description="For the whole answer.")
    choice: _Choices | None = Field(default=None, description="The answer is one of these.")
    grammar: NonEmptyText | None = Field(
        default=None, description="In Lark's notation or in llama.cpp's (GBNF)."
    )
    structural_tag: Annotated[Any, Neutral(None)] = None
    disable_fallback: bool | None = Field(default=None, description="There is none.")
    disable_any_whitespace: UnsetOrFalse = None
    disable_additional_properties: UnsetOrFalse = None
    whitespace_pattern: Annotated[Any, Neutral(None)] = None


class StructuredRequest(Wire):
    """How completions and chat completions say what an answer must be like: in one field.

    Errors name the first as `format_field`.
    """

    format_field: ClassVar[str] = "response_format"

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="Not in OpenAI's API."
    )
    guided_json: JsonObject | NonEmptyText | None = Field(
        default=None, description="As `structured_outputs.json`. Not in OpenAI's API."
    )
    guided_regex: NonEmptyText | None = Field(
        default=None, description="As `structured_outputs.regex`. Not in OpenAI's API."
    )
    guided_choice: _Choices | None = Field(
        default=None, description="As `structured_outputs.choice`. Not in OpenAI's API."
    )
    guided_grammar: NonEmptyText | None = Field(
        default=None, description="As `structured_outputs.grammar`. Not in OpenAI's API."
    )


class TgiGrammar(Wire):
    """TGI's: JSON of a schema, or a text that a regular expression matches from end to end."""

    type: Literal["json", "json_object", "regex", "json_schema"]
    value: JsonObject | NonEmptyText = Field(description=_VALUE)
