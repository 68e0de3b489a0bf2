"""`/v1/responses` as OpenAI's client asks for it, of the base and of adapters that take tools."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema
import pytest
from openai import BadRequestError, OpenAI, pydantic_function_tool
from pydantic import BaseModel

from tests.support.adapters import make_adapter
from tests.support.http_server import listening, tiny_app, tiny_config
from tests.support.models import tiny_llama
from tests.support.tools import TEMPLATES, TOOLS, WEATHER

FUNCTIONS: Any = [{"type": "function"} | tool["function"] for tool in TOOLS]
SCHEMAS = {"weather": WEATHER, "time.now": {"type": "object", "maxProperties": 0}}
USER: Any = {"role": "user", "content": "Weather in Paris?"}
GREEDY: Any = {"temperature": 0, "max_output_tokens": 5}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("responses")
    with listening(tiny_app(tiny_config(folder, context_length=2048))) as address:
        for name, template in TEMPLATES.items():
            adapter = make_adapter(folder / name, tiny_llama(), rank=4)
            (adapter / "chat_template.jinja").write_text(template)
            body = {"name": name, "source": str(adapter)}
            assert httpx.post(f"{address}/adapters", json=body, timeout=60).status_code == 201
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("model", ["base", "hermes"])
def test_a_response_says_what_a_chat_says(client: OpenAI, model: str) -> None:
    messages: Any = [{"role": "system", "content": "Be brief."}, USER]
    asked: Any = {"model": model, "temperature": 0}
    chat = client.chat.completions.create(messages=messages, max_tokens=5, **asked)
    response = client.responses.create(
        instructions="Be brief.", input=[USER], max_output_tokens=5, **asked
    )
    assert response.output_text == chat.choices[0].message.content
    assert response.model == chat.model == model
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens == 5
    assert response.usage.input_tokens_details.cached_tokens <= response.usage.input_tokens
    assert response.to_dict()["store"] is False


def test_a_stream_says_what_the_answer_says(client: OpenAI) -> None:
    asked: Any = {"model": "base", "input": "hi", **GREEDY}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == whole.output_text
    assert last.response.usage is not None
    assert last.response.usage.output_tokens == 5


def test_the_clients_own_stream_helper(client: OpenAI) -> None:
    asked: Any = {"model": "base", "input": "hi", "temperature": 0}
    choice: Any = {"extra_body": {"structured_outputs": {"choice": ["the king"]}}}
    with client.responses.stream(**asked, **choice) as stream:
        text = "".join(
            event.delta for event in stream if event.type == "response.output_text.delta"
        )
        response = stream.get_final_response()
    assert response.status == "completed"
    assert response.output_text == text == "the king"


def test_a_conversation_goes_on_with_the_items_of_its_answers(client: OpenAI) -> None:
    turns: list[Any] = [USER]
    response = client.responses.create(model="base", input=turns, **GREEDY)
    said = {"role": "assistant", "content": response.output_text}
    more: Any = {"role": "user", "content": "And then?"}
    messages: Any = [USER, said, more]
    chat = client.chat.completions.create(
        model="base", messages=messages, temperature=0, max_tokens=5
    )
    forms: list[list[Any]] = [
        [*response.output],
        [item.model_dump() for item in response.output],
        [item.to_dict() for item in response.output],
        [said],
    ]
    for answered in forms:
        again = client.responses.create(model="base", input=[*turns, *answered, more], **GREEDY)
        assert again.output_text == chat.choices[0].message.content
        assert again.usage is not None
        assert chat.usage is not None
        assert again.usage.input_tokens == chat.usage.prompt_tokens


class Person(BaseModel):
    """Who it is."""

    name: Literal["Ada", "Rick"]
    age: Literal[7, 8]


def test_an_answer_in_the_shape_of_a_model(client: OpenAI) -> None:
    asked: Any = {"model": "base", "input": "Who is it?", "text_format": Person}
    parsed = client.responses.parse(**asked, extra_body={"seed": 1})
    assert isinstance(parsed.output_parsed, Person)
    assert parsed.status == "completed"
    with client.responses.stream(**asked, extra_body={"seed": 1}) as stream:
        streamed = stream.get_final_response()
    assert streamed.output_parsed == parsed.output_parsed
    turns: list[Any] = [USER, *parsed.output, USER]
    assert client.responses.create(model="base", input=turns, **GREEDY).output_text


def test_log_probabilities(client: OpenAI) -> None:
    asked: Any = {"model": "base", "input": "hi", "top_logprobs": 2, **GREEDY}
    asked["include"] = ["message.output_text.logprobs"]
    found: Any = client.responses.create(**asked).output[0]
    logprobs = found.content[0].logprobs
    assert len(logprobs) == 5
    assert all(len(token.top_logprobs) == 2 for token in logprobs)
    events: Any = list(client.responses.create(**asked, stream=True))
    assert events[-1].response.output[0].content[0].logprobs == logprobs


def valid(items: Any) -> bool:
    for item in items:
        assert (item.type, item.status) == ("function_call", "completed")
        jsonschema.validate(json.loads(item.arguments), SCHEMAS[item.name])
    assert len({item.call_id for item in items}) == len(items)
    return True


@pytest.mark.parametrize("model", TEMPLATES)
def test_a_call_that_is_required_comes_and_a_stream_has_the_same(
    client: OpenAI, model: str
) -> None:
    asked: Any = {"model": model, "input": [USER], "tools": FUNCTIONS, "max_output_tokens": 300}
    asked |= {"tool_choice": "required", "parallel_tool_calls": False, "extra_body": {"seed": 1}}
    whole = client.responses.create(**asked)
    assert whole.status == "completed"
    assert len(whole.output) == 1
    assert valid(whole.output)
    with client.responses.stream(**asked) as stream:
        deltas = "".join(
            event.delta
            for event in stream
            if event.type == "response.function_call_arguments.delta"
        )
        streamed: Any = stream.get_final_response().output[0]
    called: Any = whole.output[0]
    assert streamed.arguments == deltas == called.arguments
    assert streamed.name == called.name


@pytest.mark.parametrize("model", TEMPLATES)
def test_the_result_of_a_call_is_in_the_next_request(
    client: OpenAI, address: str, model: str
) -> None:
    asked: Any = {"model": model, "tools": FUNCTIONS, "max_output_tokens": 300}
    turns: list[Any] = [USER]
    chosen: Any = {"type": "function", "name": "time.now"}
    response = client.responses.create(input=turns, tool_choice=chosen, **asked)
    (called,) = response.output
    assert called.type == "function_call"
    assert (called.name, json.loads(called.arguments)) == ("time.now", {})
    turns += response.output
    turns.append({"type": "function_call_output", "call_id": called.call_id, "output": "noon"})
    again = client.responses.create(input=turns, **asked | {"max_output_tokens": 2})
    call: Any = {"name": "time.now", "arguments": called.arguments}
    calls = [{"id": called.call_id, "type": "function", "function": call}]
    messages = [
        USER,
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": called.call_id, "content": "noon"},
    ]
    body = {"model": model, "messages": messages, "tools": TOOLS}
    counted = httpx.post(f"{address}/tokenize", json=body).json()
    assert again.usage is not None
    assert again.usage.input_tokens == counted["count"]


class Weather(BaseModel):
    """Tells the weather."""

    city: Literal["Köln", "Paris"]
    days: Literal[1, 2]


def test_openais_own_helper_for_tools(client: OpenAI) -> None:
    function: Any = pydantic_function_tool(Weather)["function"]
    tools: Any = [{"type": "function", **function}]
    parsed = client.responses.parse(
        model="hermes",
        input=[USER],
        tools=tools,
        tool_choice={"type": "function", "name": "Weather"},
        extra_body={"seed": 1},
    )
    (called,) = parsed.output
    assert called.type == "function_call"
    assert isinstance(called.parsed_arguments, dict)
    result = {"type": "function_call_output", "call_id": called.call_id, "output": "rain"}
    turns: Any = [USER, *parsed.output, result]
    assert client.responses.create(model="hermes", input=turns, **GREEDY).output_text


def test_an_error_names_the_field(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="nothing is stored") as caught:
        client.responses.create(model="base", input="hi", previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"
    calls: Any = [
        {"type": "function_call", "call_id": str(number), "name": "f", "arguments": "{}"}
        for number in range(129)
    ]
    with pytest.raises(BadRequestError, match="more than 128 calls") as caught:
        client.responses.create(model="base", input=calls)
    assert caught.value.param == "input.128"
    with pytest.raises(BadRequestError, match="holds 16,385 messages") as caught:
        client.responses.create(model="base", input=[USER] * 16_384, instructions="Be brief.")
    assert caught.value.param == "input"
    with pytest.raises(BadRequestError, match="does not write tools") as caught:
        client.responses.create(model="base", input="hi", tools=FUNCTIONS, stream=True)
    assert caught.value.param == "tools"
