"""The events of a streamed response, in the shapes of OpenAI's Responses API."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, RootModel

from dynamic_lora_server.schemas._base import Answer
from dynamic_lora_server.schemas.openai_answers import ChatLogprob
from dynamic_lora_server.schemas.responses_answers import OutputItem, OutputText, ResponseObject

ProgressKind = Literal[
    "response.created",
    "response.in_progress",
    "response.completed",
    "response.incomplete",
    "response.failed",
]
ItemKind = Literal["response.output_item.added", "response.output_item.done"]
PartKind = Literal["response.content_part.added", "response.content_part.done"]


class _Numbered(Answer):
    """Events are numbered from 0 on, in the order in which they are sent."""

    sequence_number: int


class ResponseProgress(_Numbered):
    """How the whole response stands; the last event is one of the last three."""

    type: ProgressKind
    response: ResponseObject


class ItemEvent(_Numbered):
    """An item of the output begins, or is whole."""

    type: ItemKind
    output_index: int
    item: OutputItem


class _OfItem(_Numbered):
    """About an item that has begun."""

    item_id: str
    output_index: int


class PartEvent(_OfItem):
    """The text of a message begins, or is whole."""

    type: PartKind
    content_index: Literal[0] = 0
    part: OutputText


class TextDelta(_OfItem):
    """More of a message's text."""

    type: Literal["response.output_text.delta"] = "response.output_text.delta"
    content_index: Literal[0] = 0
    delta: str
    logprobs: Sequence[ChatLogprob] = ()


class TextDone(_OfItem):
    """All of a message's text."""

    type: Literal["response.output_text.done"] = "response.output_text.done"
    content_index: Literal[0] = 0
    text: str
    logprobs: Sequence[ChatLogprob] = ()


class ArgumentsDelta(_OfItem):
    """More of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"] = (
        "response.function_call_arguments.delta"
    )
    delta: str


class ArgumentsDone(_OfItem):
    """All of a call's arguments."""

    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"
    name: str
    arguments: str


Event = (
    ResponseProgress | ItemEvent | PartEvent | TextDelta | TextDone | ArgumentsDelta | ArgumentsDone
)


class ResponseEvent(RootModel[Annotated[Event, Field(discriminator="type")]]):
    """One server-sent event of a response."""
