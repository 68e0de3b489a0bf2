"""The body of `POST /v1/responses`, in the shape of OpenAI's Responses API."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from dynamic_lora_server.schemas._base import (
    JsonObject,
    Neutral,
    NonEmptyText,
    Text,
    Unset,
    UnsetOrEmptyList,
    UnsetOrFalse,
    Wire,
    null_is,
)
from dynamic_lora_server.schemas.openai import MAX_MESSAGES, AnyTier, SamplingFields, few
from dynamic_lora_server.schemas.structured import StructuredOutputs
from dynamic_lora_server.schemas.tools import MAX_TOOLS, NAMED_TOOL, WORD, DefinedName
from dynamic_lora_server.schemas.unserved import UnservedResponse

Role = Literal["system", "developer", "user", "assistant"]
LOGPROBS: Literal["message.output_text.logprobs"] = "message.output_text.logprobs"
_MAX_DEPTH = 100
_TEXT, _LIST = "TextForm", "ListForm"
_MESSAGE, _CALL, _RESULT = "InputMessage", "FunctionCall", "FunctionCallOutput"
_ITEMS = {"message": _MESSAGE, "function_call": _CALL, "function_call_output": _RESULT}
# As errors have them in the places that they name.
INPUT_FORMS = frozenset({_TEXT, _LIST, *_ITEMS.values()})


def _of_types(*served: str) -> BeforeValidator:
    """Refuses an object of another type by that alone, and not by all its fields."""

    def check(value: object) -> object:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind not in served:
            raise ValueError(
                f"has the type {kind!r}, which this server does not support; "
                f"it takes {', '.join(served)}"
            )
        return value

    return BeforeValidator(check)


def _shallow(value: dict[str, Any]) -> dict[str, Any]:
    """The answer repeats it, and what writes answers follows no deeper object."""
    depth = 0
    level: list[Any] = [value]
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise ValueError(f"is nested more than {_MAX_DEPTH} levels deep")
        within = (one for outer in level for one in _inner(outer))
        level = [one for one in within if isinstance(one, dict | list)]
    return value


def _inner(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value


def _form(value: object) -> str | None:
    if isinstance(value, str):
        return _TEXT
    return _LIST if isinstance(value, list) else None


def _includable(value: object) -> object:
    if isinstance(value, str) and value != LOGPROBS:
        raise ValueError(f"is not supported by this server, which takes {LOGPROBS} alone")
    return value


_TEXT_OR_LIST = Discriminator(
    _form,
    custom_error_type="text_or_list",
    custom_error_message="needs a text or a list",
)
_Includable = Annotated[Literal["message.output_text.logprobs"], BeforeValidator(_includable)]
_Schema = Annotated[JsonObject, AfterValidator(_shallow)]
_Status = Annotated[
    Literal["in_progress", "completed", "incomplete"] | None,
    Field(description="Of an item that an answer had; changes nothing."),
]
_Id = Annotated[Text | None, Field(description="Of an item that an answer had; changes nothing.")]


class ContentPart(Wire):
    """A piece of a message, or of what a function gave."""

    type: Literal["input_text", "output_text"]
    text: Text
    annotations: UnsetOrEmptyList = None
    logprobs: Any = Field(default=None, description="What an answer had; changes nothing.")
    parsed: Any = Field(
        default=None, description="What OpenAI's client read the text as; changes nothing."
    )
    prompt_cache_breakpoint: Unset = None


_Part = Annotated[ContentPart, _of_types("input_text", "output_text")]
_Several = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
_Content = Annotated[
    Annotated[Text, Tag(_TEXT)] | Annotated[list[_Part], _Several, few("parts"), Tag(_LIST)],
    _TEXT_OR_LIST,
]


class InputMessage(Wire):
    """One turn of a conversation, or what the assistant said in one."""

    type: Annotated[Literal["message"], null_is("message", Literal["message"])] = "message"
    role: Role = Field(description="`developer` is `system`.")
    content: _Content
    id: _Id = None
    status: _Status = None
    phase: Unset = None


class FunctionCall(Wire):
    """A call in an earlier turn of the model's."""

    type: Literal["function_call"]
    call_id: NonEmptyText
    name: NonEmptyText
    arguments: Text = Field(description="The JSON text of an object.")
    id: _Id = None
    status: _Status = None
    namespace: Unset = None
    caller: Unset = None
    async_: UnsetOrFalse = Field(default=None, alias="async")
    parsed_arguments: Any = Field(
        default=None, description="What OpenAI's client read the arguments as; changes nothing."
    )


class FunctionCallOutput(Wire):
    """The result of a call in the model's turn before it."""

    type: Literal["function_call_output"]
    call_id: NonEmptyText
    output: _Content
    id: _Id = None
    status: _Status = None
    name: Unset = None
    namespace: Unset = None
    caller: Unset = None


def _kind(item: object) -> str:
    if not isinstance(item, dict):
        return _MESSAGE
    return _ITEMS.get(str(item.get("type", "message")), _MESSAGE)


InputItem = Annotated[
    Annotated[InputMessage, Tag(_MESSAGE)]
    | Annotated[FunctionCall, Tag(_CALL)]
    | Annotated[FunctionCallOutput, Tag(_RESULT)],
    Discriminator(_kind),
    _of_types(*_ITEMS),
]
_Input = Annotated[
    Annotated[Text, Tag(_TEXT)] | Annotated[list[InputItem], _Several, few("items"), Tag(_LIST)],
    _TEXT_OR_LIST,
]


class FunctionTool(Wire):
    """A function that the model may call."""

    type: Literal["function"]
    name: DefinedName
    description: Text | None = None
    parameters: _Schema | None = Field(
        default=None, description="A JSON schema of an object; left out, there are none."
    )
    strict: bool | None = Field(
        default=None,
        description="Of one tool: hold the calls of all to their schemas also where `tool_choice` "
        "is `auto`. Left out, it is false.",
    )
    allowed_callers: Annotated[Any, Neutral(None, ["direct"])] = None
    async_: UnsetOrFalse = Field(default=None, alias="async")
    defer_loading: UnsetOrFalse = None
    output_schema: Unset = None


class NamedFunction(Wire):
    """The one function that must be called."""

    type: Literal["function"]
    name: NonEmptyText


def _choice(value: object) -> str:
    return NAMED_TOOL if isinstance(value, dict) else WORD


_ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(WORD)]
    | Annotated[NamedFunction, _of_types("function"), Tag(NAMED_TOOL)],
    Discriminator(_choice),
]


class TextFormat(Wire):
    """Any text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = Field(default=None, description="Of the schema; changes nothing.")
    description: Text | None = Field(default=None, description="As `name`.")
    schema_: _Schema | None = Field(
        default=None, alias="schema", description="With `json_schema` alone, which needs it."
    )
    strict: bool | None = Field(default=None, description="Changes nothing: a schema is kept to.")

    @model_validator(mode="after")
    def _schema_if_asked(self) -> "TextFormat":
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("needs a schema, as its type is json_schema")
        if self.type != "json_schema" and self.schema_ is not None:
            raise ValueError(f"has a schema, which says nothing of the type {self.type}")
        return self


class TextConfig(Wire):
    """What the text of an answer must be like."""

    format: TextFormat | None = None
    verbosity: Annotated[Any, Neutral(None, "medium")] = None


class ResponseStreamOptions(Wire):
    """What a stream of events carries besides them."""

    include_obfuscation: UnsetOrFalse = None


Metadata = Annotated[
    dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]],
    Field(max_length=16),
]


class ResponseRequest(SamplingFields, UnservedResponse):
    """The body of `POST /v1/responses`. Nothing is stored: all of a conversation is in `input`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "base", "input": "Name three rivers.", "max_output_tokens": 32}]
        }
    )

    input: _Input = Field(
        description="What the user says, or the items of a conversation, its answers among them."
    )
    instructions: Text | None = Field(
        default=None, description="What the system says before all of `input`."
    )
    max_output_tokens: int | None = Field(
        default=None, ge=1, lt=2**31, description="Default 1024, or what the context has left."
    )
    text: TextConfig | None = None
    tools: (
        Annotated[
            list[Annotated[FunctionTool, _of_types("function")]],
            Field(max_length=MAX_TOOLS, fail_fast=True),
        ]
        | None
    ) = Field(default=None, description="For templates that write them.")
    tool_choice: _ToolChoice | None = Field(
        default=None, description="Default `auto` where there are `tools`."
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="False: one call at most. Default true."
    )
    include: Annotated[list[_Includable], Field(max_length=16, fail_fast=True)] | None = Field(
        default=None, description="Log-probabilities of a text; not beside tools."
    )
    top_logprobs: int | None = Field(
        default=None, ge=0, le=20, description=f"Needs `{LOGPROBS}` in `include`."
    )
    stream_options: ResponseStreamOptions | None = Field(
        default=None, description="Needs `stream`."
    )
    metadata: Metadata | None = Field(
        default=None, description="The caller's own; the answer repeats it."
    )
    prompt_cache_key: Text | None = Field(default=None, description="As `user`.")
    safety_identifier: Text | None = Field(default=None, description="As `user`.")
    service_tier: AnyTier = None
    chat_template_kwargs: JsonObject | None = Field(
        default=None,
        description="Variables for the chat template, such as `enable_thinking`. Not in OpenAI's "
        "API.",
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="In place of `text.format`. Not in OpenAI's API."
    )
