"""Wire models: what passes, and what is refused by name."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from dynamic_lora_server.schemas.adapters import AdapterSource
from dynamic_lora_server.schemas.generate import GenerateRequest
from dynamic_lora_server.schemas.openai import ChatDelta, ChatRequest, CompletionRequest, Message

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}


def refused(model: type[BaseModel], body: dict[str, Any]) -> tuple[str, str]:
    """The place and the text of the only error."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    (error,) = caught.value.errors()
    return ".".join(str(part) for part in error["loc"]), error["msg"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("typical_p", 0.5),
        ("best_of", 2),
        ("best_of", True),
        ("watermark", True),
        ("decoder_input_details", True),
        ("adapter_source", "hub"),
        ("api_token", "x"),
        ("return_k_alternatives", 2),
    ],
)
def test_what_tgi_and_lorax_have_and_this_server_has_not(name: str, value: Any) -> None:
    place, text = refused(GenerateRequest, {"inputs": "x", "parameters": {name: value}})
    assert place == f"parameters.{name}"
    assert "not supported" in text


def test_neutral_values_of_the_same_fields_pass() -> None:
    parameters: dict[str, Any] = {
        "typical_p": 1.0,
        "best_of": 1,
        "watermark": False,
        "decoder_input_details": False,
        "grammar": None,
        "adapter_source": None,
        "stop_sequences": [],
    }
    request = GenerateRequest.model_validate({"inputs": "x", "parameters": parameters})
    assert request.inputs == "x"


@pytest.mark.parametrize(
    ("parameters", "place"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": 2**64}, "seed"),
        ({"n": 33}, "n"),
        ({"top_n_tokens": 21}, "top_n_tokens"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": ["x"] * 33}, "stop"),
        ({"do_sample": 1}, "do_sample"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_generate_parameters_out_of_range(parameters: dict[str, Any], place: str) -> None:
    found, _ = refused(GenerateRequest, {"inputs": "x", "parameters": parameters})
    assert found == f"parameters.{place}"


@pytest.mark.parametrize(
    ("body", "place"),
    [({"inputs": ""}, "inputs"), ({"inputs": "x", "adapter": "ner"}, "adapter"), ({}, "inputs")],
)
def test_generate_bodies(body: dict[str, Any], place: str) -> None:
    assert refused(GenerateRequest, body)[0] == place


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function"}]},
        {"logit_bias": {"5": 1}},
        {"tool_choice": "required"},
        {"modalities": ["audio"]},
        {"store": True},
        {"reasoning_effort": "high"},
        {"prediction": {}},
    ],
)
def test_what_chat_does_not_serve(field: dict[str, Any]) -> None:
    place, text = refused(ChatRequest, CHAT | field)
    assert place == next(iter(field))
    assert "not supported" in text


def test_chat_with_neutral_values() -> None:
    neutral = {
        "tools": [],
        "response_format": {"type": "text"},
        "logit_bias": {},
        "tool_choice": "none",
        "modalities": ["text"],
        "store": False,
        "user": "someone",
        "prompt_cache_key": "a",
        "safety_identifier": "b",
        "n": 1,
    }
    assert ChatRequest.model_validate(CHAT | neutral).n == 1


@pytest.mark.parametrize(
    ("field", "place"),
    [({"echo": True}, "echo"), ({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of")],
)
def test_what_completions_do_not_serve(field: dict[str, Any], place: str) -> None:
    assert refused(CompletionRequest, COMPLETION | field)[0] == place


def test_a_message_is_text_or_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert Message.model_validate({"role": "user", "content": parts}).text == "ab"
    with pytest.raises(ValidationError):
        Message.model_validate({"role": "user", "content": [{"type": "image_url"}]})
    assert refused(Message, {"role": "tool", "content": "x"})[0] == "role"


@pytest.mark.parametrize("value", [{"a": ["\ud83d"]}, {"\ud83d": 1}, {"a": {"b": "x\ude00"}}])
def test_half_a_character_anywhere_in_an_object(value: dict[str, Any]) -> None:
    place, text = refused(ChatRequest, CHAT | {"chat_template_kwargs": value})
    assert place == "chat_template_kwargs"
    assert "half of a character" in text


def test_an_object_may_be_nested_deeply() -> None:
    value: dict[str, Any] = {}
    for _ in range(5000):
        value = {"a": value}
    assert ChatRequest.model_validate(CHAT | {"chat_template_kwargs": value})


def test_a_delta_leaves_out_what_it_does_not_change() -> None:
    assert ChatDelta(content="x").model_dump() == {"content": "x"}


def test_a_source_is_named() -> None:
    assert refused(AdapterSource, {"name": "a", "source": ""})[0] == "source"
