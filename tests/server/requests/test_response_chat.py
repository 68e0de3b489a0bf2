"""Bodies of `/v1/responses` as the chat completions that ask for the same."""

from typing import Any

import pytest
from openai.types.responses import (
    ParsedResponseFunctionToolCall,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
)
from pydantic import ValidationError

from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.requests.response_chat import chat_of
from dynamic_lora_server.requests.structured import openai_grammar
from dynamic_lora_server.schemas.openai import MAX_MESSAGES, ChatRequest
from dynamic_lora_server.schemas.responses import ResponseRequest
from dynamic_lora_server.schemas.tools import MAX_TOOLS

USER = {"role": "user", "content": "Weather?"}
CALL = {"type": "function_call", "call_id": "a", "name": "weather", "arguments": '{"days": 2}'}
OTHER = {**CALL, "call_id": "b"}
RESULT = {"type": "function_call_output", "call_id": "a", "output": "rain"}


def chat(**fields: Any) -> ChatRequest:
    return chat_of(ResponseRequest.model_validate({"model": "m", "input": "hi"} | fields))


def turns(*items: Any, **fields: Any) -> list[tuple[str, str, list[str]]]:
    """Role, text and the ids of calls of each message; a result has that of its call."""
    messages = chat(input=list(items), **fields).messages
    return [
        (
            message.role,
            message.text,
            [message.tool_call_id] if message.tool_call_id else _ids(message.tool_calls),
        )
        for message in messages
    ]


def _ids(calls: Any) -> list[str]:
    return [call.id for call in calls or ()]


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_a_text_is_what_the_user_says_and_instructions_come_before() -> None:
    (message,) = chat().messages
    assert (message.role, message.text) == ("user", "hi")
    assert turns(USER, instructions="Be brief.") == [
        ("system", "Be brief.", []),
        ("user", "Weather?", []),
    ]


def test_messages_of_all_roles_and_parts() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    answered = {"type": "output_text", "text": "c", "annotations": [], "logprobs": []}
    assert turns(
        {"type": "message", "role": "developer", "content": "x"},
        {"type": None, "role": "system", "content": "y"},
        {"role": "user", "content": parts, "status": "completed", "id": "msg_1"},
        {"role": "assistant", "content": [answered]},
    ) == [("developer", "x", []), ("system", "y", []), ("user", "a\nb", []), ("assistant", "c", [])]


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ([CALL, RESULT], [("assistant", "", ["a"]), ("tool", "rain", ["a"])]),
        ([said("x"), CALL, OTHER], [("assistant", "x", ["a", "b"])]),
        ([CALL, said("x"), OTHER, said("y")], [("assistant", "x\ny", ["a", "b"])]),
        ([said("x"), said("y")], [("assistant", "x", []), ("assistant", "y", [])]),
        (
            [CALL, RESULT, OTHER],
            [("assistant", "", ["a"]), ("tool", "rain", ["a"]), ("assistant", "", ["b"])],
        ),
        (
            [CALL, OTHER, RESULT, {**RESULT, "call_id": "b"}, said("x")],
            [
                ("assistant", "", ["a", "b"]),
                ("tool", "rain", ["a"]),
                ("tool", "rain", ["b"]),
                ("assistant", "x", []),
            ],
        ),
        (
            [CALL, USER, {**RESULT, "output": [{"type": "input_text", "text": "sun"}]}],
            [("assistant", "", ["a"]), ("user", "Weather?", []), ("tool", "sun", ["a"])],
        ),
    ],
)
def test_calls_are_a_part_of_the_models_turn(items: list[Any], messages: list[Any]) -> None:
    assert turns(*items) == messages


def test_the_items_of_an_answer_go_back_as_clients_dump_them() -> None:
    text = {"type": "output_text", "text": "hello", "annotations": [], "logprobs": []}
    message = ResponseOutputMessage.model_validate(
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [text],
        }
    )
    called = CALL | {"id": "fc_1", "status": "completed"}
    for call in (
        ResponseFunctionToolCall.model_validate(called),
        ParsedResponseFunctionToolCall.model_validate(called | {"parsed_arguments": {"days": 2}}),
    ):
        dumped = [message.model_dump(by_alias=True), call.model_dump(by_alias=True)]
        assert turns(*dumped) == [("assistant", "hello", ["a"])]
        assert turns(message.to_dict(), call.to_dict()) == [("assistant", "hello", ["a"])]


@pytest.mark.parametrize(
    ("items", "field", "message"),
    [
        ([RESULT], "input.0.call_id", "No call has the id 'a' in the model's turn before."),
        ([CALL, {**RESULT, "call_id": "b"}], "input.1.call_id", "No call has the id 'b'"),
        ([CALL, RESULT, OTHER, RESULT], "input.3.call_id", "No call has the id 'a'"),
        ([USER, CALL, CALL], "input.2.call_id", "Two calls have the id 'a'."),
        ([{**CALL, "arguments": "{"}], "input.0.arguments", "input.0.arguments is no JSON: "),
        ([{**CALL, "arguments": "[]"}], "input.0.arguments", "is no JSON object."),
    ],
)
def test_items_that_do_not_belong_together(items: list[Any], field: str, message: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        turns(*items)
    assert caught.value.field == field
    assert message in caught.value.message


MANY: Any = [{"type": "input_text", "text": "a"}] * MAX_MESSAGES
CALLS = [{**CALL, "call_id": str(number)} for number in range(MAX_TOOLS + 1)]


@pytest.mark.parametrize(
    ("items", "field", "message"),
    [
        ([USER] * MAX_MESSAGES, "messages", "holds 16,385 messages; at most 16,384 are taken"),
        ([said("x"), *CALLS], "input.129", "The model's turn has more than 128 calls."),
        (
            [CALL, {"role": "assistant", "content": MANY}, said("x")],
            "input.2.content",
            "The model's turn has more than 16,384 texts",
        ),
    ],
)
def test_items_that_are_more_than_a_chat_may_have(
    items: list[Any], field: str, message: str
) -> None:
    with pytest.raises(InvalidParameter) as caught:
        turns(*items, instructions="Be brief.")
    assert caught.value.field == field
    assert message in caught.value.message
    assert turns(*items[:-1], instructions="Be brief.")


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([USER] * (MAX_MESSAGES + 1), "holds 16,385 items; at most 16,384 are taken"),
        ([{**USER, "content": [*MANY, MANY[0]]}], "holds 16,385 parts; at most 16,384 are taken"),
        ([{**RESULT, "output": [*MANY, MANY[0]]}], "holds 16,385 parts; at most 16,384 are taken"),
    ],
)
def test_a_body_of_too_many_items_or_parts(items: list[Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        chat(input=items)
    assert len(caught.value.errors()) == 1


def test_sampling_and_limits_are_those_of_a_chat() -> None:
    same = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "logit_bias": {"3": 1.0},
        "min_tokens": 2,
        "seed": -2,
        "stop": ["x"],
        "stop_token_ids": [4],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "stream": True,
        "user": "u",
        "chat_template_kwargs": {"a": 1},
        "parallel_tool_calls": False,
    }
    asked = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}
        | {"max_completion_tokens": 7, "logprobs": False}
        | same
    )
    assert chat(max_output_tokens=7, **same).model_dump() == asked.model_dump()


def test_tools_and_the_choice_of_one() -> None:
    tool = {"type": "function", "name": "f", "description": "d", "parameters": {}, "strict": True}
    asked = chat(tools=[tool], tool_choice={"type": "function", "name": "f"})
    dumped = asked.model_dump()
    function = {"name": "f", "description": "d", "parameters": {}, "strict": True}
    assert dumped["tools"] == [{"type": "function", "function": function}]
    assert dumped["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert chat(tools=[tool], tool_choice="required").tool_choice == "required"


def test_what_the_text_must_be_like() -> None:
    assert openai_grammar(chat(text={"format": {"type": "text"}})) is None
    schema = {"type": "json_schema", "name": "n", "schema": {"const": 1}, "strict": True}
    grammar = openai_grammar(chat(text={"format": schema, "verbosity": "medium"}))
    assert grammar is not None
    assert (grammar.source, grammar.field) == ('{"const": 1}', "text.format")
    grammar = openai_grammar(chat(text={"format": {"type": "json_object"}}))
    assert grammar is not None
    assert grammar.source == '{"type": "object"}'
    with pytest.raises(InvalidParameter, match="text.format and structured_outputs.regex both"):
        openai_grammar(chat(text={"format": schema}, structured_outputs={"regex": "a"}))


def test_log_probabilities_are_those_of_a_text() -> None:
    tool = {"type": "function", "name": "f"}
    included = {"include": ["message.output_text.logprobs"]}
    assert chat(**included, top_logprobs=2).logprobs is True
    assert chat(**included, tools=[tool], tool_choice="none").logprobs is True
    assert chat(include=[], top_logprobs=0).logprobs is False
    with pytest.raises(InvalidParameter, match="with tools the answer may be a call") as caught:
        chat(**included, tools=[tool])
    assert caught.value.field == "include"
    with pytest.raises(InvalidParameter, match="top_logprobs needs message.output_text") as caught:
        chat(top_logprobs=2)
    assert caught.value.field == "top_logprobs"
