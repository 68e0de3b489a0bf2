"""`POST /v1/responses` on a server with a tiny base: what is refused, and in which words."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.http_server import listening, tiny_app, tiny_config

BODY: dict[str, Any] = {"model": "base", "input": "hi", "max_output_tokens": 2}
USER = {"role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "b", "output": "x"}
TOOL = {"type": "function", "name": "f"}
UNSTORED = "is not supported by this server; nothing is stored"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with (
        listening(tiny_app(tiny_config(tmp_path_factory.mktemp("responses")))) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        yield client


def deep(levels: int) -> dict[str, Any]:
    """An object of so many levels."""
    value: dict[str, Any] = {"type": "object"}
    for _ in range(levels - 1):
        value = {"not": value}
    return value


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"input": None}, "input", "input: needs a text or a list."),
    ({"input": []}, "input", "input: List should have at least 1 item"),
    ({"input": [0]}, "input.0", "input.0: "),
    ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role", "input.0.role: Input should"),
    ({"input": [{"role": "user"}]}, "input.0.content", "input.0.content: Field required."),
    ({"input": [USER, {**USER, "name": "x"}]}, "input.1.name", "is not a field of this request."),
    ({"input": [{**USER, "content": 1}]}, "input.0.content", "needs a text or a list."),
    (
        {"input": [{"type": "item_reference", "id": "msg_1"}]},
        "input.0",
        "input.0: has the type 'item_reference', which this server does not support; it takes "
        "message, function_call, function_call_output.",
    ),
    (
        {"input": [{"type": "reasoning", "summary": []}]},
        "input.0",
        "input.0: has the type 'reasoning', which this server does not support;",
    ),
    (
        {"input": [{**USER, "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input.0.content.0",
        "input.0.content.0: has the type 'input_image', which this server does not support; it "
        "takes input_text, output_text.",
    ),
    (
        {"input": [{**RESULT, "output": [{"type": "input_file", "file_id": "x"}]}]},
        "input.0.output.0",
        "has the type 'input_file', which this server does not support;",
    ),
    ({"input": [CALL, RESULT]}, "input.1.call_id", "No call has the id 'b' in the model's turn"),
    ({"input": [{**CALL, "arguments": "x"}]}, "input.0.arguments", "is no JSON"),
    ({"input": [CALL]}, "input", "does not write calls of earlier turns"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", UNSTORED),
    ({"conversation": "conv_1"}, "conversation", UNSTORED),
    ({"store": True}, "store", f"{UNSTORED}: leave it out or send false."),
    ({"background": True}, "background", "background: is not supported by this server;"),
    ({"truncation": "auto"}, "truncation", "send what the context holds."),
    ({"reasoning": {"effort": "low"}}, "reasoning.effort", "reasoning.effort: is not supported"),
    ({"reasoning": {"summary": "auto"}}, "reasoning.summary", "is not supported by this server"),
    (
        {"include": ["reasoning.encrypted_content"]},
        "include.0",
        "is not supported by this server, which takes message.output_text.logprobs alone.",
    ),
    (
        {"tools": [{"type": "web_search"}]},
        "tools.0",
        "tools.0: has the type 'web_search', which this server does not support; it takes "
        "function.",
    ),
    ({"tools": [TOOL]}, "tools", "does not write tools: the model would not see them."),
    ({"tools": [{**TOOL, "name": "a b"}]}, "tools.0.name", "tools.0.name: String should match"),
    ({"tools": [TOOL, TOOL], "tool_choice": "none"}, "tools.1.name", "Two tools have the name f."),
    ({"tools": [TOOL | {"function": {}}]}, "tools.0.function", "is not a field of this request."),
    (
        {"tools": [{**TOOL, "parameters": deep(101)}]},
        "tools.0.parameters",
        "is nested more than 100 levels deep.",
    ),
    ({"tool_choice": "required"}, "tool_choice", "tool_choice asks for a call, but there are no"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}},
        "tool_choice.name",
        "tool_choice names 'g', which is none of the tools.",
    ),
    (
        {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
        "tool_choice",
        "tool_choice: has the type 'allowed_tools', which this server does not support;",
    ),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format", "needs a schema, as its type"),
    (
        {"text": {"format": {"type": "text", "schema": {}}}},
        "text.format",
        "has a schema, which says nothing of the type text.",
    ),
    (
        {"text": {"format": {"type": "json_schema", "schema": {"uniqueItems": True}}}},
        "text.format",
        "The JSON schema of text.format cannot be used: ",
    ),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "is not supported by this server;"),
    ({"top_logprobs": 2}, "top_logprobs", "top_logprobs needs message.output_text.logprobs in"),
    (
        {"stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "is not supported by this server; leave it out.",
    ),
    ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
    ({"max_output_tokens": 10**6}, "max_output_tokens", "but the context holds"),
    ({"input": "x" * 10**5}, "input", "but the context holds"),
    ({"max_output_tokens": 1, "min_tokens": 2}, "min_tokens", "at least 2 tokens, and at most 1"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "at most 16 items"),
    ({"metadata": {"a": 1}}, "metadata.a", "metadata.a: Input should be a valid string"),
    ({"max_tokens": 2}, "max_tokens", "max_tokens: is not a field of this request."),
    ({"messages": []}, "messages", "messages: is not a field of this request."),
    ({"response_format": {}}, "response_format", "is not a field of this request."),
    ({"n": 2}, "n", "n: is not a field of this request."),
    ({"stop[]": ["a"]}, "stop[]", "stop[]: is not a field of this request."),
    ({"str": 1}, "str", "str: is not a field of this request."),
    ({"text": {"str": 1}}, "text.str", "text.str: is not a field of this request."),
    ({"max_output_tokens": int("9" * 4300)}, "max_output_tokens", "less than 2147483648"),
    ({"input": "a\ud83d"}, "input", "which is half of a character."),
]


@pytest.mark.parametrize(("more", "param", "message"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_is_named_with_the_reason(
    client: httpx.Client, more: dict[str, Any], param: str, message: str, stream: bool
) -> None:
    content = json.dumps(BODY | more | {"stream": stream})
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/responses", content=content, headers=headers)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert message in error["message"]


def test_options_of_a_stream_need_one(client: httpx.Client) -> None:
    answer = client.post("/v1/responses", json=BODY | {"stream_options": {}})
    assert answer.json()["error"]["message"] == "stream_options needs stream. Add stream=true."
    assert answer.json()["error"]["param"] == "stream_options"


def test_a_model_that_is_not_there(client: httpx.Client) -> None:
    answer = client.post("/v1/responses", json=BODY | {"model": "nope"})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "No adapter is named 'nope'" in error["message"]


def test_what_asks_for_nothing_passes(client: httpx.Client) -> None:
    neutral: dict[str, Any] = {
        "background": False,
        "store": False,
        "previous_response_id": None,
        "truncation": "disabled",
        "reasoning": {"effort": "none", "summary": None},
        "include": [],
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "text": {"format": {"type": "text"}},
        "service_tier": "auto",
        "prompt_cache_key": "a",
        "safety_identifier": "b",
        "metadata": {"c": "d"},
    }
    answer = client.post("/v1/responses", json=BODY | neutral)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    same = ("store", "background", "truncation", "metadata", "prompt_cache_key", "text", "tools")
    assert {name: found[name] for name in same} == {name: neutral[name] for name in same}


def test_schemas_may_be_as_deep_as_answers_can_repeat_them(client: httpx.Client) -> None:
    tool = TOOL | {"parameters": {"type": "object", "properties": {"a": deep(98)}}}
    answer = client.post("/v1/responses", json=BODY | {"tools": [tool], "tool_choice": "none"})
    assert answer.json()["error"]["message"].startswith("The base model's chat template does not")


def test_no_route_gives_a_response_back(client: httpx.Client) -> None:
    made = client.post("/v1/responses", json=BODY).json()
    assert client.get(f"/v1/responses/{made['id']}").status_code == 404
