"""Calls and their results among the messages of a conversation, as chat templates have them."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dynamic_lora_server.errors import InvalidParameter

if TYPE_CHECKING:
    from dynamic_lora_server.schemas.openai import Message


def has_calls(messages: "Sequence[Message]") -> bool:
    """Whether the model called something in an earlier turn."""
    return any(message.tool_calls for message in messages)


def has_results(messages: "Sequence[Message]") -> bool:
    """Whether there are results of calls."""
    return any(message.role == "tool" for message in messages)


def with_calls(
    turns: Sequence[dict[str, Any]], messages: "Sequence[Message]"
) -> list[dict[str, Any]]:
    """The turns of a conversation together with what their messages call or answer.

    Arguments become objects, and a result is told the name of its function: so do templates
    expect it. Raises InvalidParameter, naming the field.
    """
    found, calls = [], {}
    for index, (turn, message) in enumerate(zip(turns, messages, strict=True)):
        place = f"messages.{index}"
        _check_fields(message, place)
        if message.role == "assistant":
            calls = _calls_by_id(message, place)
        more: dict[str, Any] = {}
        if message.tool_calls:
            more["tool_calls"] = list(calls.values())
        elif message.role == "tool":
            called = _answered(message.tool_call_id, calls, place)
            more = {"tool_call_id": message.tool_call_id, "name": called["function"]["name"]}
        found.append({**turn, **more})
    return found


def _check_fields(message: "Message", place: str) -> None:
    """Raise InvalidParameter for a field that is missing or belongs to another role."""
    if message.content is None and not message.tool_calls:
        raise InvalidParameter(
            f"{place}.content is required, unless the message has tool_calls.",
            field=f"{place}.content",
        )
    if message.tool_calls and message.role != "assistant":
        raise InvalidParameter(
            f"A message of the role {message.role} has no tool_calls; the assistant's have.",
            field=f"{place}.tool_calls",
        )
    if message.tool_call_id is not None and message.role != "tool":
        raise InvalidParameter(
            f"A message of the role {message.role} has no tool_call_id; those of tools have.",
            field=f"{place}.tool_call_id",
        )


def _calls_by_id(message: "Message", place: str) -> dict[str, dict[str, Any]]:
    calls: dict[str, dict[str, Any]] = {}
    for index, call in enumerate(message.tool_calls or ()):
        if call.id in calls:
            raise InvalidParameter(
                f"Two calls have the id {call.id!r}.", field=f"{place}.tool_calls.{index}.id"
            )
        field = f"{place}.tool_calls.{index}.function.arguments"
        arguments = arguments_of(call.function.arguments, field)
        function = {"name": call.function.name, "arguments": arguments}
        calls[call.id] = {"id": call.id, "type": "function", "function": function}
    return calls


def arguments_of(text: str, field: str) -> dict[str, Any]:
    """The arguments of a call, which are an object. Raises InvalidParameter, naming the field.

    A model wrote them, and they are read as clients read them: of a key that comes twice the last
    value counts. Halves of surrogate pairs, which no text can hold, become question marks.
    """
    if not text.strip():
        return {}  # so do some models call a function without parameters
    try:
        found = json.loads(text)
        if "\\u" in text:
            whole = json.dumps(found, ensure_ascii=False).encode("utf-8", "replace")
            found = json.loads(whole)
    except (ValueError, RecursionError) as error:
        raise InvalidParameter(f"{field} is no JSON: {error}.", field=field) from error
    if not isinstance(found, dict):
        raise InvalidParameter(f"{field} is no JSON object.", field=field)
    return found


def _answered(call_id: str | None, calls: dict[str, dict[str, Any]], place: str) -> dict[str, Any]:
    field = f"{place}.tool_call_id"
    if call_id is None:
        raise InvalidParameter(
            f"{field} is required: it says which call the message answers.", field=field
        )
    if call_id not in calls:
        raise InvalidParameter(
            f"No call has the id {call_id!r} in the assistant's message before.",
            field=field,
            fix="Send the message with tool_calls first, then one of the role tool for each.",
        )
    return calls[call_id]
