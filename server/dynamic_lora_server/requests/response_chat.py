"""From the body of `/v1/responses` to the chat completion that asks for the same."""

from collections.abc import Container
from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import ValidationError

from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.schemas.openai import (
    MAX_MESSAGES,
    ChatRequest,
    Message,
    SamplingFields,
    StreamOptions,
    TextPart,
)
from dynamic_lora_server.schemas.responses import (
    LOGPROBS,
    ContentPart,
    FunctionCall,
    FunctionCallOutput,
    FunctionTool,
    InputMessage,
    NamedFunction,
    ResponseRequest,
    Role,
    TextFormat,
)
from dynamic_lora_server.schemas.structured import NamedSchema, ResponseFormat
from dynamic_lora_server.schemas.tools import (
    MAX_TOOLS,
    CalledFunction,
    Function,
    FunctionName,
    NamedTool,
    Tool,
    ToolCall,
    ToolChoice,
)
from dynamic_lora_server.tools.conversation import arguments_of


class ResponseChat(ChatRequest):
    """A chat that was asked for as a response."""

    format_field: ClassVar[str] = "text.format"


def chat_of(body: ResponseRequest) -> ResponseChat:
    """The chat completion that asks for the same.

    Raises InvalidParameter, naming the field as a response has it, for items that do not belong
    together or are more than a chat may have, and for log-probabilities that have no place.
    """
    try:
        return _chat(body)
    except ValidationError as error:  # together they may break a rule that each of them keeps
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        fault = first["msg"].removeprefix("Value error, ")
        raise InvalidParameter(f"As a chat, {field} {fault}.", field=field) from error


def _chat(body: ResponseRequest) -> ResponseChat:
    shared = {name: getattr(body, name) for name in SamplingFields.model_fields}
    return ResponseChat(
        **shared,
        messages=_messages(body),
        max_completion_tokens=body.max_output_tokens,
        response_format=_format(body),
        structured_outputs=body.structured_outputs,
        tools=None if body.tools is None else [_tool(one) for one in body.tools],
        tool_choice=_tool_choice(body),
        parallel_tool_calls=body.parallel_tool_calls,
        logprobs=_logprobs(body),
        top_logprobs=body.top_logprobs,
        chat_template_kwargs=body.chat_template_kwargs,
        stream_options=None if body.stream_options is None else StreamOptions(),
    )


def _format(body: ResponseRequest) -> ResponseFormat | None:
    asked = None if body.text is None else body.text.format
    if asked is None:
        return None
    return ResponseFormat(type=asked.type, json_schema=_schema(asked))


def _schema(asked: TextFormat) -> NamedSchema | None:
    return None if asked.schema_ is None else NamedSchema(schema=asked.schema_)


def _tool(tool: FunctionTool) -> Tool:
    function = Function(
        name=tool.name,
        description=tool.description,
        parameters=tool.parameters,
        strict=tool.strict,
    )
    return Tool(type="function", function=function)


def _tool_choice(body: ResponseRequest) -> ToolChoice | None:
    choice = body.tool_choice
    if isinstance(choice, NamedFunction):
        return NamedTool(function=FunctionName(name=choice.name))
    return choice


def _logprobs(body: ResponseRequest) -> bool:
    """Whether there are log-probabilities, which are those of a text."""
    if LOGPROBS not in (body.include or ()):
        if body.top_logprobs:
            raise InvalidParameter(
                f"top_logprobs needs {LOGPROBS} in include.",
                field="top_logprobs",
                fix=f'Add include=["{LOGPROBS}"].',
            )
        return False
    if body.tools and body.tool_choice != "none":
        raise InvalidParameter(
            f"{LOGPROBS} are of a text, and with tools the answer may be a call.",
            field="include",
            fix="Leave one of the two out, or set tool_choice to none.",
        )
    return True


def _messages(body: ResponseRequest) -> list[Message]:
    conversation = _Conversation()
    if body.instructions is not None:
        conversation.say("system", body.instructions, "instructions")
    if isinstance(body.input, str):
        conversation.say("user", body.input, "input")
        return conversation.messages()
    for index, item in enumerate(body.input):
        place = f"input.{index}"
        match item:
            case InputMessage():
                conversation.say(item.role, item.content, place)
            case FunctionCall():
                conversation.call(item, place)
            case FunctionCallOutput():
                conversation.answer(item, place)
    return conversation.messages()


@dataclass(slots=True)
class _Turn:
    """One of the model's: what it said and what it called, by the calls' ids."""

    said: list[TextPart] = field(default_factory=list)
    calls: dict[str, ToolCall] = field(default_factory=dict)

    def message(self) -> Message:
        return Message(
            role="assistant",
            content=self.said or None,
            tool_calls=list(self.calls.values()) or None,
        )


class _Conversation:
    """Gathers the messages that items stand for.

    A chat has a turn of the model's in one message, where a response has an item for each call,
    and texts before, between and behind them.
    """

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._turn: _Turn | None = None  # the model's, while it may go on
        self._called: Container[str] = ()  # the ids of the calls that may be answered

    def messages(self) -> list[Message]:
        """All of them; nothing may follow."""
        self._end_turn()
        return self._messages

    def say(self, role: Role, content: str | list[ContentPart], place: str) -> None:
        parts = _parts(content)
        if role != "assistant":
            self._end_turn()
            self._messages.append(Message(role=role, content=parts))
            return
        # Texts one after another are turns; one behind a call is a part of the call's.
        turn = self._turn if self._turn is not None and self._turn.calls else self._begin_turn()
        turn.said += parts
        if len(turn.said) > MAX_MESSAGES:
            raise InvalidParameter(
                f"The model's turn has more than {MAX_MESSAGES:,} texts, counting those behind its "
                "calls.",
                field=f"{place}.content",
            )

    def call(self, item: FunctionCall, place: str) -> None:
        turn = self._turn or self._begin_turn()
        if item.call_id in turn.calls:
            raise InvalidParameter(
                f"Two calls have the id {item.call_id!r}.", field=f"{place}.call_id"
            )
        if len(turn.calls) == MAX_TOOLS:
            raise InvalidParameter(
                f"The model's turn has more than {MAX_TOOLS} calls.", field=place
            )
        arguments_of(item.arguments, f"{place}.arguments")
        function = CalledFunction(name=item.name, arguments=item.arguments)
        turn.calls[item.call_id] = ToolCall(id=item.call_id, type="function", function=function)

    def answer(self, item: FunctionCallOutput, place: str) -> None:
        if item.call_id not in self._called:
            raise InvalidParameter(
                f"No call has the id {item.call_id!r} in the model's turn before.",
                field=f"{place}.call_id",
                fix="Send the items of the type function_call first, then one of the type "
                "function_call_output for each.",
            )
        self._end_turn()
        parts = _parts(item.output)
        self._messages.append(Message(role="tool", content=parts, tool_call_id=item.call_id))

    def _begin_turn(self) -> _Turn:
        self._end_turn()
        self._turn = _Turn()
        self._called = self._turn.calls
        return self._turn

    def _end_turn(self) -> None:
        if self._turn is not None:
            self._messages.append(self._turn.message())
            self._turn = None


def _parts(content: str | list[ContentPart]) -> list[TextPart]:
    texts = [content] if isinstance(content, str) else [part.text for part in content]
    return [TextPart(type="text", text=text) for text in texts]
