"""Generation events as responses, whole and as streams, in the types of OpenAI's client."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from dynamic_lora_server.answers.responses import ResponseAnswer
from dynamic_lora_server.answers.streams import Generation, WholeAnswer
from dynamic_lora_server.errors import EngineFailed, GrammarFailed
from dynamic_lora_server.generation import FinishReason
from dynamic_lora_server.schemas.responses import ResponseRequest
from dynamic_lora_server.tools.notation import HERMES
from dynamic_lora_server.tools.offer import Offer
from tests.support.events import finish, generation, piece

CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def offer(*, forced: bool) -> Offer:
    return Offer(notation=HERMES, names=frozenset({"f"}), forced=forced, grammar=None)


def answer(*, logprobs: bool = False, offer: Offer | None = None, **fields: Any) -> ResponseAnswer:
    body = ResponseRequest.model_validate({"model": "m", "input": "hi"} | fields)
    return ResponseAnswer(body, model="m", logprobs=logprobs, offer=offer)


async def at_once(work: Callable[[], bytes]) -> bytes:
    return work()


async def told(one: ResponseAnswer, events: Generation) -> list[Any]:
    """The events as they are on the wire, each by the name and in the number that it must have."""
    text = b"".join([chunk async for chunk in one.stream(events, at_once)]).decode()
    found = []
    for number, block in enumerate(text.removesuffix("\n\n").split("\n\n")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        EVENT.validate_python(event)
        found.append(event)
    return found


def whole(one: ResponseAnswer, answer: WholeAnswer) -> Any:
    document = json.loads(one.whole(answer).model_dump_json())
    Response.model_validate(document)
    return document


def without_ids(item: Any) -> Any:
    return {name: value for name, value in item.items() if name not in ("id", "call_id")}


def kinds(events: list[Any]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_a_text_at_once() -> None:
    found = whole(
        answer(metadata={"a": "b"}, user="u", instructions="x", max_output_tokens=9),
        WholeAnswer(finish(FinishReason.EOS, "hi")),
    )
    (item,) = found["output"]
    assert without_ids(item) == {
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "hi", "annotations": [], "logprobs": []}],
    }
    assert found["usage"] == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 5,
    }
    assert (found["status"], found["incomplete_details"], found["error"]) == (
        "completed",
        None,
        None,
    )
    assert found["completed_at"] >= found["created_at"]
    assert (found["metadata"], found["user"], found["instructions"]) == ({"a": "b"}, "u", "x")
    assert (found["store"], found["max_output_tokens"], found["temperature"]) == (False, 9, 1.0)


def test_what_is_repeated_of_a_request() -> None:
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    schema = {"type": "json_schema", "name": "n", "schema": {"const": 1}}
    found = whole(
        answer(
            tools=[tool],
            tool_choice={"type": "function", "name": "f"},
            text={"format": schema},
            parallel_tool_calls=False,
        ),
        WholeAnswer(finish(FinishReason.EOS, "")),
    )
    assert found["tools"] == [tool | {"description": None, "strict": None}]
    assert found["tool_choice"] == {"type": "function", "name": "f"}
    assert found["text"] == {"format": schema}
    assert found["parallel_tool_calls"] is False


def test_an_answer_that_its_length_cuts_off() -> None:
    found = whole(answer(), WholeAnswer(finish(FinishReason.LENGTH, "hi")))
    assert (found["status"], found["completed_at"]) == ("incomplete", None)
    assert found["incomplete_details"] == {"reason": "max_output_tokens"}
    assert found["output"][0]["status"] == "incomplete"


async def test_the_events_of_a_text() -> None:
    events = await told(
        answer(),
        generation(piece("h"), piece("", token="i"), finish(FinishReason.EOS, "hi!", tail="i!")),
    )
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["delta"] for event in events[4:6]] == ["h", "i!"]
    assert events[6]["text"] == "hi!"
    assert events[0]["response"]["status"] == events[1]["response"]["status"] == "in_progress"
    assert (events[2]["item"]["status"], events[2]["item"]["content"]) == ("in_progress", [])
    assert events[-1]["response"]["output"] == [events[-2]["item"]]
    assert events[-1]["response"]["usage"]["output_tokens"] == 2
    assert {event["item_id"] for event in events[3:8]} == {events[2]["item"]["id"]}


async def test_an_empty_answer_is_an_empty_message() -> None:
    end = finish(FinishReason.STOP, "")
    for one in (None, offer(forced=False)):
        events = await told(answer(offer=one), generation(end))
        (item,) = whole(answer(offer=one), WholeAnswer(end))["output"]
        assert item["content"][0]["text"] == ""
        assert without_ids(events[-1]["response"]["output"][0]) == without_ids(item)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("size", [1, 7, 500])
@pytest.mark.parametrize(
    ("text", "reason", "items"),
    [
        (CALL, FinishReason.EOS, [("function_call", "completed")]),
        (CALL * 2, FinishReason.EOS, [("function_call", "completed")] * 2),
        (CALL, FinishReason.LENGTH, [("function_call", "completed")]),
    ],
)
async def test_calls_are_items_and_a_stream_says_what_the_answer_says(
    forced: bool, size: int, text: str, reason: FinishReason, items: list[Any]
) -> None:
    end = finish(reason, text)
    found = whole(answer(offer=offer(forced=forced)), WholeAnswer(end))
    assert [(item["type"], item["status"]) for item in found["output"]] == items
    assert {item["arguments"] for item in found["output"]} == {'{"a": 1}'}
    assert found["status"] == ("incomplete" if reason is FinishReason.LENGTH else "completed")
    pieces = [piece(text[at : at + size]) for at in range(0, len(text), size)]
    events = await told(answer(offer=offer(forced=forced)), generation(*pieces, end))
    streamed = events[-1]["response"]
    assert [*map(without_ids, streamed["output"])] == [*map(without_ids, found["output"])]
    assert kinds(events)[2:4] == ["output_item.added", "function_call_arguments.delta"]
    assert kinds(events)[-3:-1] == ["function_call_arguments.done", "output_item.done"]
    assert streamed["status"] == found["status"]


async def test_text_around_a_call_has_messages_of_its_own() -> None:
    text = f"Look. {CALL} Done."
    end = finish(FinishReason.LENGTH, text)
    events = await told(answer(offer=offer(forced=False)), generation(piece(text), end))
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "message"]
    assert [item["status"] for item in output] == ["completed", "completed", "incomplete"]
    assert [output[at]["content"][0]["text"] for at in (0, 2)] == ["Look.", "Done."]
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [event["output_index"] for event in added] == [0, 1, 2]
    assert whole(answer(offer=offer(forced=False)), WholeAnswer(end))["status"] == "incomplete"


@pytest.mark.parametrize(
    ("reason", "status"), [(FinishReason.LENGTH, "incomplete"), (FinishReason.STOP, "completed")]
)
async def test_a_call_that_is_cut_off_is_incomplete(reason: FinishReason, status: str) -> None:
    text = CALL[: CALL.index("1")]
    events = await told(
        answer(offer=offer(forced=True)), generation(piece(text), finish(reason, text))
    )
    response = events[-1]["response"]
    assert response["status"] == status
    assert (response["output"][0]["status"], response["output"][0]["arguments"]) == (
        "incomplete",
        '{"a": ',
    )


async def test_openais_client_adds_the_events_up() -> None:
    text = f"Look. {CALL}"
    events = await told(
        answer(offer=offer(forced=False)),
        generation(*map(piece, text), finish(FinishReason.EOS, text)),
    )
    state: Any = ResponseStreamState(input_tools=[], text_format=omit)
    for event in events:
        state.handle_event(EVENT.validate_python(event))
    message, call = state._completed_response.output
    assert message.content[0].text == "Look."
    assert (call.name, call.arguments) == ("f", '{"a": 1}')


async def test_log_probabilities() -> None:
    pieces = [piece("h"), piece("", token="i"), piece("", token="</s>", special=True)]
    end = finish(FinishReason.EOS, "hi", tail="i")
    found = whole(answer(logprobs=True), WholeAnswer(end, pieces))
    tokens = found["output"][0]["content"][0]["logprobs"]
    assert [token["token"] for token in tokens] == ["h", "i", "</s>"]
    assert tokens[0]["top_logprobs"] == [{"token": " a", "logprob": -0.5, "bytes": [32, 97]}]
    events = await told(answer(logprobs=True), generation(*pieces, end))
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [event["delta"] for event in deltas] == ["h", "", "", "i"]
    assert [token for event in deltas for token in event["logprobs"]] == tokens
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == tokens
    (done,) = (event for event in events if event["type"] == "response.output_text.done")
    assert done["logprobs"] == tokens


async def test_the_end_of_a_stream_with_log_probabilities_is_written_elsewhere() -> None:
    """Those of a long answer take seconds, in which no stream would go on."""
    written: list[bytes] = []

    async def write(work: Callable[[], bytes]) -> bytes:
        written.append(work())
        return written[-1]

    for logprobs in (False, True):
        events = generation(piece("hi"), finish(FinishReason.EOS, "hi"))
        chunks = [one async for one in answer(logprobs=logprobs).stream(events, write)]
        assert written == ([chunks[-1]] if logprobs else [])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            EngineFailed("The step broke.", fix="Ask again."),
            "server_error",
            "broke. Ask again.",
        ),
        (GrammarFailed("No token is left."), "invalid_prompt", "No token is left."),
        (KeyError("secret"), "server_error", "The server met an error of its own"),
    ],
)
async def test_a_stream_that_breaks_off_ends_with_a_failure(
    error: Exception, code: str, message: str
) -> None:
    events = await told(answer(), generation(piece("h"), error))
    assert kinds(events)[-2:] == ["output_text.delta", "failed"]
    response = events[-1]["response"]
    assert (response["status"], response["error"]["code"]) == ("failed", code)
    assert message in response["error"]["message"]
    assert "secret" not in response["error"]["message"]
