"""Structured output as OpenAI's, TGI's, LoRAX's and vLLM's clients ask for it."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import pytest
from huggingface_hub import InferenceClient
from openai import BadRequestError, OpenAI

from tests.support.http_server import listening, tiny_app, tiny_config

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["king", "hill"]},
        "ages": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}
FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "person", "schema": SCHEMA, "strict": True},
}
BROKEN = {"type": "array", "uniqueItems": True}
MESSAGES: Any = [{"role": "user", "content": "Who is it?"}]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with listening(tiny_app(tiny_config(tmp_path_factory.mktemp("structured")))) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def is_of(schema: dict[str, Any], text: str | None) -> bool:
    assert text is not None
    jsonschema.validate(json.loads(text), schema)
    return True


def generate(address: str, **parameters: Any) -> httpx.Response:
    body = {"inputs": "the rain", "parameters": {"max_new_tokens": 300} | parameters}
    return httpx.post(f"{address}/generate", json=body, timeout=60)


def test_openais_client(client: OpenAI) -> None:
    chat = client.chat.completions.create(
        model="base",
        messages=MESSAGES,
        response_format=FORMAT,
        n=4,
        seed=1,
    )
    for choice in chat.choices:
        assert choice.finish_reason == "stop"
        assert is_of(SCHEMA, choice.message.content)
    assert len({choice.message.content for choice in chat.choices}) == 4


def test_a_stream_says_what_the_answer_says(client: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "base",
        "messages": MESSAGES,
        "response_format": FORMAT,
        "seed": 7,
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == (
        whole.choices[0].message.content
    )
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_longest_length_cuts_an_answer_off(client: OpenAI) -> None:
    asked: dict[str, Any] = {"response_format": FORMAT, "seed": 3, "max_tokens": 6}
    chat = client.chat.completions.create(model="base", messages=MESSAGES, **asked)
    assert chat.choices[0].finish_reason == "length"
    assert (chat.choices[0].message.content or "").lstrip().startswith("{")


def test_any_object(client: OpenAI) -> None:
    asked: dict[str, Any] = {"response_format": {"type": "json_object"}, "n": 8, "seed": 3}
    chat = client.chat.completions.create(
        model="base", messages=MESSAGES, max_tokens=200, frequency_penalty=1.0, **asked
    )
    whole = [one.message.content for one in chat.choices if one.finish_reason == "stop"]
    assert whole
    assert all(is_of({"type": "object"}, text) for text in whole)


@pytest.mark.parametrize(
    ("field", "pattern"),
    [
        ({"structured_outputs": {"regex": "[ab]{3}c"}}, "[ab]{3}c"),
        ({"structured_outputs": {"choice": ["the king", "on the hill"]}}, "the king|on the hill"),
        ({"structured_outputs": {"grammar": 'root ::= "x" root | "y"'}}, "x*y"),
        ({"guided_regex": "a|b"}, "a|b"),
        ({"guided_choice": ["7"]}, "7"),
        ({"guided_json": {"const": 12}}, " ?12"),
    ],
)
def test_vllms_fields(client: OpenAI, field: dict[str, Any], pattern: str) -> None:
    asked: dict[str, Any] = {"model": "base", "prompt": "the", "seed": 1, "max_tokens": 300}
    answer = client.completions.create(**asked, extra_body=field)
    assert answer.choices[0].finish_reason == "stop"
    assert re.fullmatch(pattern, answer.choices[0].text)


def test_tgis_client(address: str) -> None:
    client = InferenceClient(f"{address}/generate")
    grammars: list[Any] = [
        {"type": "json", "value": SCHEMA},
        {"type": "json_schema", "value": {"name": "person", "schema": SCHEMA}},
    ]
    for grammar in grammars:
        answer = client.text_generation(
            "the rain",
            grammar=grammar,
            max_new_tokens=300,
            do_sample=True,
            seed=2,
            details=True,
        )
        assert is_of(SCHEMA, answer.generated_text)
        assert answer.details is not None
        assert answer.details.finish_reason == "eos_token"
    digits: Any = {"type": "regex", "value": r"\d{3}-\d{4}"}
    number = client.text_generation("the rain", grammar=digits, max_new_tokens=20)
    assert re.fullmatch(r"\d{3}-\d{4}", number)


@pytest.mark.parametrize("asked", [FORMAT, {"type": "json", "value": SCHEMA}])
def test_the_hubs_client_in_a_chat(address: str, asked: Any) -> None:
    """It sends the first as `{"type": "json_object", "value": ...}`, the second as it is."""
    client = InferenceClient(address)
    chat = client.chat_completion(MESSAGES, response_format=asked, max_tokens=300, seed=1)
    assert is_of(SCHEMA, chat.choices[0].message.content)


def test_loraxs_response_format(address: str) -> None:
    asked = {"type": "json_object", "schema": SCHEMA}
    answer = generate(address, response_format=asked, temperature=1.0, seed=4)
    assert is_of(SCHEMA, answer.json()["generated_text"])


def test_guided_and_other_requests_side_by_side(address: str) -> None:
    """Each gets what it gets alone."""
    asked: list[dict[str, Any]] = [
        {"max_new_tokens": 40, "ignore_eos": True},
        {"grammar": {"type": "json", "value": SCHEMA}, "temperature": 1.0, "seed": 1},
        {"max_new_tokens": 40, "temperature": 0.8, "seed": 2, "ignore_eos": True},
        {"grammar": {"type": "regex", "value": "[a-f]{30}"}},
    ]

    def text(one: dict[str, Any]) -> str:
        answer = generate(address, **one).json()
        return str(answer["generated_text"])

    alone = [text(one) for one in asked]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(text, asked * 2))
    assert together == alone * 2


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": BROKEN}}}, "unique"),
        ({"guided_regex": "a("}, "unclosed"),
        ({"guided_grammar": "start: nothing"}, "nothing"),
        ({"guided_regex": "a", "ignore_eos": True}, "nothing may follow"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "both say"),
    ],
)
def test_errors_of_v1(client: OpenAI, field: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequestError, match=message) as caught:
        client.completions.create(model="base", prompt="x", extra_body=field)
    assert caught.value.param in field
    assert client.completions.create(model="base", prompt="x", max_tokens=1).choices


def test_a_grammar_that_grows_too_large_in_an_answer(client: OpenAI) -> None:
    number = range(200)
    rules = [f'r{n}: "a" r{n} | "a" r{(n + 1) % 200} | "a"' for n in number]
    rules.append(f"start: ({'|'.join(f'r{n}' for n in number)})+")
    (letter,) = httpx.post(f"{client.base_url}../tokenize", json={"prompt": "a"}).json()["tokens"]
    with pytest.raises(BadRequestError, match="followed no further: .* max is 2000"):
        client.completions.create(
            model="base",
            prompt="x",
            max_tokens=9,
            logit_bias={str(letter): 100},
            extra_body={"guided_grammar": "\n".join(rules)},
        )
    assert client.completions.create(model="base", prompt="x", max_tokens=1).choices


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"grammar": {"type": "json", "value": BROKEN}}, "parameters.grammar"),
        ({"grammar": {"type": "regex", "value": "("}}, "parameters.grammar"),
        (
            {"response_format": {"type": "json_object", "schema": BROKEN}},
            "parameters.response_format",
        ),
        (
            {"grammar": {"type": "regex", "value": "a"}, "ignore_eos": True},
            "parameters.ignore_eos",
        ),
    ],
)
def test_errors_of_generate(address: str, parameters: dict[str, Any], field: str) -> None:
    refused = generate(address, **parameters)
    assert refused.status_code == 422
    assert refused.json()["field"] == field
    assert generate(address, max_new_tokens=1).status_code == 200
