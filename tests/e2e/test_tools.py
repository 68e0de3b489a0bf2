"""Tool calls as OpenAI's client asks for them, of adapters whose chat templates take tools."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema
import pytest
from huggingface_hub import InferenceClient
from openai import BadRequestError, OpenAI, pydantic_function_tool
from pydantic import BaseModel

from tests.support.adapters import make_adapter
from tests.support.http_server import listening, tiny_app, tiny_config
from tests.support.models import tiny_llama
from tests.support.tools import INSTRUCTIONS, SILENT, TEMPLATES, TOOLS, WEATHER, function

MESSAGES: Any = [{"role": "user", "content": "Weather in Paris?"}]
ADAPTERS = {**TEMPLATES, "instructions": INSTRUCTIONS, "silent": SILENT}
SCHEMAS = {"weather": WEATHER, "time.now": {"type": "object", "maxProperties": 0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tools")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with listening(tiny_app(tiny_config(folder, context_length=2048))) as address:
        for name, template in ADAPTERS.items():
            adapter = make_adapter(folder / name, tiny_llama(), rank=4)
            (adapter / "chat_template.jinja").write_text(template)
            body = {"name": name, "source": str(adapter)}
            assert httpx.post(f"{address}/adapters", json=body, timeout=60).status_code == 201
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def valid(tool_calls: Any) -> bool:
    for one in tool_calls:
        assert one.type == "function"
        jsonschema.validate(json.loads(one.function.arguments), SCHEMAS[one.function.name])
    assert len({one.id for one in tool_calls}) == len(tool_calls)
    return True


def ask(client: OpenAI, model: str, **more: Any) -> Any:
    asked: dict[str, Any] = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 300, "seed": 1}
    return client.chat.completions.create(model=model, **asked | more)


@pytest.mark.parametrize("model", TEMPLATES)
def test_a_call_that_is_required_comes(client: OpenAI, model: str) -> None:
    answer = ask(client, model, tool_choice="required", parallel_tool_calls=False, n=3)
    for choice in answer.choices:
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert len(choice.message.tool_calls) == 1
        assert valid(choice.message.tool_calls)
    assert len({c.message.tool_calls[0].function.arguments for c in answer.choices}) > 1


@pytest.mark.parametrize(("model", "name"), [("hermes", "weather"), ("mistral", "time.now")])
def test_the_function_that_is_named_is_called(client: OpenAI, model: str, name: str) -> None:
    chosen: Any = {"type": "function", "function": {"name": name}}
    (choice,) = ask(client, model, tool_choice=chosen).choices
    (called,) = choice.message.tool_calls
    assert called.function.name == name
    assert valid([called])


def test_the_hubs_client(address: str) -> None:
    client = InferenceClient(base_url=f"{address}/v1")
    asked: dict[str, Any] = {"model": "llama3", "tools": TOOLS, "max_tokens": 200}
    chosen: Any = {"function": {"name": "time.now"}}
    answer = client.chat_completion(MESSAGES, tool_choice=chosen, **asked)
    message = answer.choices[0].message
    assert message.tool_calls
    (called,) = message.tool_calls
    assert (called.function.name, json.loads(called.function.arguments)) == ("time.now", {})
    result = {"role": "tool", "tool_call_id": called.id, "content": "noon"}
    said = {"role": "assistant", "tool_calls": message.tool_calls}
    again = client.chat_completion([*MESSAGES, said, result], **asked | {"max_tokens": 2})
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens


def deep(levels: int) -> dict[str, Any]:
    """A schema of objects within objects."""
    inner: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        inner = {"type": "object", "properties": {"a": inner}}
    return inner


def functions(choice: Any) -> list[tuple[str, str]]:
    return [(one.function.name, one.function.arguments) for one in choice.message.tool_calls]


@pytest.mark.parametrize("model", TEMPLATES)
def test_a_stream_says_what_the_answer_says(client: OpenAI, model: str) -> None:
    asked: dict[str, Any] = {
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "n": 2,
        "logprobs": True,
    }
    whole = ask(client, model, **asked)
    with client.chat.completions.stream(
        model=model,
        messages=MESSAGES,
        tools=TOOLS,
        seed=1,
        max_tokens=300,
        stream_options={"include_usage": True},
        **asked,
    ) as stream:
        kinds = {event.type for event in stream}
        streamed = stream.get_final_completion()
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert streamed.usage is not None
    assert streamed.usage.completion_tokens == whole.usage.completion_tokens
    both: Any = zip(streamed.choices, whole.choices, strict=True)
    for one, other in both:
        assert one.finish_reason == other.finish_reason == "tool_calls"
        assert one.message.content is other.message.content is None
        tokens = [[token.bytes for token in choice.logprobs.content] for choice in (one, other)]
        assert tokens[0] == tokens[1]
        assert functions(one) == functions(other)


class Weather(BaseModel):
    """Tells the weather."""

    city: Literal["Köln", "Paris"]
    days: int


def test_openais_own_helper_and_a_conversation_that_goes_on(client: OpenAI, address: str) -> None:
    """The call that the client parsed is part of the next request."""
    tool = pydantic_function_tool(Weather)
    parsed = client.chat.completions.parse(
        model="hermes",
        messages=MESSAGES,
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "Weather"}},
        max_tokens=300,
        seed=1,
    )
    message = parsed.choices[0].message
    assert message.tool_calls
    (called,) = message.tool_calls
    assert isinstance(called.function.parsed_arguments, Weather)
    assert "parsed_arguments" in str(plain(message))
    result: Any = {"role": "tool", "tool_call_id": called.id, "content": "rain"}
    messages: list[Any] = [*MESSAGES, plain(message), result]
    answer = ask(client, "hermes", messages=messages, tools=None, max_tokens=3)
    assert answer.choices[0].message.tool_calls is None
    body = {"model": "hermes", "messages": [*MESSAGES, plain(message), result]}
    counted = httpx.post(f"{address}/tokenize", json=body).json()
    assert counted["count"] == answer.usage.prompt_tokens
    text = httpx.post(f"{address}/detokenize", json={"tokens": counted["tokens"]})
    prompt = text.json()["prompt"]
    written = json.dumps(json.loads(called.function.arguments), ensure_ascii=False)
    assert f'<tool_call>\n{{"name": "Weather", "arguments": {written}}}\n</tool_call>' in prompt
    assert prompt.endswith("[result] rain\n[assistant] ")


def plain(message: BaseModel) -> Any:
    return message.model_dump(include={"role", "content", "tool_calls"}, exclude_none=True)


def test_left_to_the_model_an_answer_is_text_until_it_calls(client: OpenAI) -> None:
    for more in ({}, {"parallel_tool_calls": False}, {"tool_choice": "none"}):
        answer = ask(client, "hermes", max_tokens=20, **more)
        (choice,) = answer.choices
        assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
        assert choice.message.content


def test_a_conversation_goes_on_from_its_last_message(client: OpenAI) -> None:
    begun: list[Any] = [*MESSAGES, {"role": "assistant", "content": "It is "}]
    more = {"extra_body": {"continue_final_message": True, "add_generation_prompt": False}}
    on = ask(client, "hermes", messages=begun, tools=None, max_tokens=4, temperature=0, **more)
    prompt = "[user] Weather in Paris?\n[assistant] It is "
    same = client.completions.create(model="hermes", prompt=prompt, max_tokens=4, temperature=0)
    assert on.choices[0].message.content == same.choices[0].text
    again = ask(client, "hermes", messages=begun, tools=None, max_tokens=4, temperature=0)
    assert again.usage.prompt_tokens > on.usage.prompt_tokens


@pytest.mark.parametrize(
    ("model", "more", "param"),
    [
        ("base", {}, "tools"),
        ("silent", {}, "tools"),
        ("hermes", {"tools": [function("a b")]}, "tools.0.function.name"),
        ("hermes", {"tool_choice": "any"}, "tool_choice"),
        (
            "hermes",
            {"tool_choice": {"type": "function", "function": {}}},
            "tool_choice.function.name",
        ),
        (
            "hermes",
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice.function.name",
        ),
        ("hermes", {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
        (
            "hermes",
            {"tools": [function("f", {"properties": {"a": deep(80)}})], "tool_choice": "required"},
            "tools",
        ),
        (
            "hermes",
            {"tools": [function("f", {"uniqueItems": True})], "tool_choice": "required"},
            "tools",
        ),
    ],
)
def test_errors_name_the_field(
    client: OpenAI, model: str, more: dict[str, Any], param: str
) -> None:
    with pytest.raises(BadRequestError) as caught:
        ask(client, model, **more)
    assert caught.value.param == param


def test_the_tokens_of_tools_are_counted(client: OpenAI, address: str) -> None:
    for tools in (TOOLS, None):
        answer = ask(client, "instructions", tools=tools, max_tokens=1)
        body = {"model": "instructions", "messages": MESSAGES, "tools": tools}
        counted = httpx.post(f"{address}/tokenize", json=body).json()
        assert counted["count"] == answer.usage.prompt_tokens
