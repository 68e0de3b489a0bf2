"""The calls of an answer as chat completions write them, whole and in deltas."""

from dynamic_lora_server.answers.openai import FINISH
from dynamic_lora_server.generation import FinishReason
from dynamic_lora_server.schemas import openai_answers as wire
from dynamic_lora_server.tools.calls import CallArguments, CallBegin, Part, Reader, Words
from dynamic_lora_server.tools.offer import Offer


def first_delta(offer: Offer | None) -> wire.ChatDelta:
    """What begins a message; its content stays null if it turns out to be calls alone."""
    return wire.ChatDelta(role="assistant", content="" if offer is None else None)


def delta_of(part: Part) -> wire.ChatDelta:
    """What a part adds to its message."""
    match part:
        case Words():
            return wire.ChatDelta(content=part.text)
        case CallBegin():
            function = wire.FunctionDelta(name=part.name, arguments="")
            call = wire.ToolCallDelta(
                index=part.index, id=part.id, type="function", function=function
            )
        case CallArguments():
            function = wire.FunctionDelta(arguments=part.text)
            call = wire.ToolCallDelta(index=part.index, function=function)
    return wire.ChatDelta(tool_calls=[call])


def whole_message(text: str, reader: Reader) -> tuple[wire.ChatMessage, bool]:
    """The message that a whole text is, and whether it ends with a whole call."""
    content: list[str] = []
    begun: list[CallBegin] = []
    arguments: list[str] = []
    for part in [*reader.push(text), *reader.finish()]:
        match part:
            case Words():
                content.append(part.text)
            case CallBegin():
                begun.append(part)
                arguments.append("")
            case CallArguments():
                arguments[part.index] += part.text
    calls = [
        wire.ToolCall(
            id=call.id,
            function=wire.CalledFunction(name=call.name, arguments=arguments[call.index]),
        )
        for call in begun
    ]
    said = "".join(content)
    message = wire.ChatMessage(
        content=None if calls and not said else said, tool_calls=calls or None
    )
    return message, reader.called


def finish_name(reason: FinishReason, *, called: bool) -> wire.FinishName:
    """Why an answer ended: with its calls, unless its length cut it off."""
    if called and reason is not FinishReason.LENGTH:
        return "tool_calls"
    return FINISH[reason]
