"""Tools on the wire: what a request offers, which of it is to be called, and earlier calls."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from dynamic_lora_server.schemas._base import JsonObject, NonEmptyText, Text, Wire

MAX_TOOLS = 128
DefinedName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]


class Function(Wire):
    """A function that the model may call."""

    name: DefinedName
    description: Text | None = None
    parameters: JsonObject | None = Field(
        default=None, description="A JSON schema of an object; left out, there are none."
    )
    strict: bool | None = Field(
        default=None,
        description="Of one tool: hold the calls of all to their schemas also where `tool_choice` "
        "is `auto`.",
    )


class Tool(Wire):
    """A function on offer."""

    type: Literal["function"]
    function: Function


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]


class FunctionName(Wire):
    """One of the functions on offer."""

    name: NonEmptyText


class NamedTool(Wire):
    """The one function that must be called."""

    type: Literal["function"] = "function"  # the Hub's client leaves it out
    function: FunctionName


NAMED_TOOL = "NamedTool"
WORD = "ToolChoiceWord"
CHOICES = frozenset({NAMED_TOOL, WORD})  # as errors have them in the places that they name


def _choice(value: object) -> str:
    return NAMED_TOOL if isinstance(value, dict | NamedTool) else WORD


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(WORD)]
    | Annotated[NamedTool, Tag(NAMED_TOOL)],
    Discriminator(_choice),
]


class CalledFunction(Wire):
    """What was called, and the JSON text of an object with its arguments."""

    name: NonEmptyText
    arguments: Text
    description: Text | None = Field(
        default=None, description="The Hub's client sends one; changes nothing."
    )
    parsed_arguments: Any = Field(
        default=None, description="What OpenAI's client read the arguments as; changes nothing."
    )


class ToolCall(Wire):
    """A call in an earlier turn of the model's."""

    id: NonEmptyText
    type: Literal["function"]
    function: CalledFunction
    index: int | None = Field(
        default=None, description="Where a stream had it; changes nothing: the order counts."
    )


ToolCalls = Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)]


class TemplateRequest(Wire):
    """How a request says what the chat template is to write besides the messages."""

    tools: Tools | None = Field(
        default=None, description="For templates that write them; for others refused."
    )
    add_generation_prompt: bool | None = Field(
        default=None,
        description="Default true, unless `continue_final_message` is: begin the model's turn. "
        "Not in OpenAI's API.",
    )
    continue_final_message: bool | None = Field(
        default=None,
        description="Go on from the last message, which is an assistant's. Not in OpenAI's API.",
    )
