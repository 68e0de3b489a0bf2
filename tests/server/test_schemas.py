"""Wire models: what passes, and what is refused by name."""

from typing import Any

import pytest
from huggingface_hub import ChatCompletionOutputMessage
from openai.types.chat import ChatCompletionMessage, ParsedChatCompletionMessage
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase as ResponseParams
from pydantic import BaseModel, ValidationError

from dynamic_lora_server.schemas.adapters import AdapterSource
from dynamic_lora_server.schemas.compositions import WeightedAdapter
from dynamic_lora_server.schemas.generate import GenerateRequest
from dynamic_lora_server.schemas.openai import ChatRequest, CompletionRequest, Message
from dynamic_lora_server.schemas.openai_answers import ChatDelta
from dynamic_lora_server.schemas.responses import ResponseRequest
from dynamic_lora_server.schemas.tokenize import DetokenizeRequest, TokenizeRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}
MODELS: dict[str, type[BaseModel]] = {
    "messages": ChatRequest,
    "prompt": CompletionRequest,
    "inputs": GenerateRequest,
}
MANY_FIELDS = {f"field-{i}": 0 for i in range(1000)}


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
        ("adapter_source", "local"),
        ("adapter_source", "s3"),
        ("adapter_source", "pbase"),
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
        "adapter_source": "hub",
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
        {"functions": [{"name": "f"}]},
        {"function_call": {"name": "f"}},
        {"modalities": ["audio"]},
        {"store": True},
        {"reasoning_effort": "high"},
        {"prediction": {}},
        {"moderation": {"model": "omni-moderation-latest"}},
        {"prompt_cache_options": {"mode": "explicit"}},
        {"prompt_cache_retention": "24h"},
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
        "tool_choice": "none",
        "modalities": ["text"],
        "store": False,
        "user": "someone",
        "prompt_cache_key": "a",
        "safety_identifier": "b",
        "moderation": None,
        "prompt_cache_options": {},
        "prompt_cache_retention": None,
        "n": 1,
    }
    assert ChatRequest.model_validate(CHAT | neutral).n == 1


VLLM: dict[str, Any] = {
    "allowed_token_ids": None,
    "bad_words": [],
    "length_penalty": 1.0,
    "min_tokens": 0,
    "priority": 0,
    "prompt_logprobs": None,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "stop_token_ids": [],
    "top_k": 0,
    "truncate_prompt_tokens": None,
    "use_beam_search": False,
    "vllm_xargs": None,
}
VLLM_CHAT = VLLM | {
    "add_generation_prompt": True,
    "add_special_tokens": False,
    "best_of": 1,
    "chat_template": None,
    "documents": None,
    "echo": False,
    "include_reasoning": True,
}


def test_vllms_fields_at_its_defaults() -> None:
    ChatRequest.model_validate(CHAT | VLLM_CHAT)
    CompletionRequest.model_validate(COMPLETION | VLLM | {"add_special_tokens": True})


@pytest.mark.parametrize(
    "field",
    [
        {"allowed_token_ids": [1]},
        {"length_penalty": 0.5},
        {"priority": 1},
        {"skip_special_tokens": False},
        {"truncate_prompt_tokens": 5},
        {"use_beam_search": True},
    ],
)
def test_what_vllm_has_and_this_server_has_not(field: dict[str, Any]) -> None:
    for model, body in ((ChatRequest, CHAT), (CompletionRequest, COMPLETION)):
        place, text = refused(model, body | field)
        assert place == next(iter(field))
        assert "not supported" in text


@pytest.mark.parametrize(
    ("field", "place"),
    [({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of")],
)
def test_what_completions_do_not_serve(field: dict[str, Any], place: str) -> None:
    assert refused(CompletionRequest, COMPLETION | field)[0] == place


@pytest.mark.parametrize(
    ("model", "body", "place"),
    [
        (ChatRequest, CHAT | {"messages": [0] * 1000}, "messages.0"),
        (TokenizeRequest, {"messages": [0] * 1000}, "TokenizeMessages.messages.0"),
        (DetokenizeRequest, {"tokens": [1, *[""] * 1000]}, "tokens.1"),
        (GenerateRequest, {"inputs": "x"} | MANY_FIELDS, ""),
        (GenerateRequest, {"inputs": "x", "parameters": MANY_FIELDS}, "parameters"),
        (ChatRequest, CHAT | {"messages": [MANY_FIELDS] * 1000}, "messages.0"),
        (ResponseRequest, {"model": "m", "input": [0] * 1000}, "input.ListForm.0.InputMessage"),
        (
            ResponseRequest,
            {"model": "m", "input": [{"role": "user", "content": [0] * 1000}]},
            "input.ListForm.0.InputMessage.content.ListForm.0",
        ),
        (AdapterSource, {"name": "a", "source": "b"} | MANY_FIELDS, ""),
    ],
)
def test_a_long_body_of_faults_is_one_error(
    model: type[BaseModel], body: dict[str, Any], place: str
) -> None:
    assert refused(model, body)[0] == place


@pytest.mark.parametrize(
    "body",
    [
        CHAT | {"messages": [{"role": "user", "content": [0] * 1000}]},
        COMPLETION | {"prompt": [None] * 1000},
        COMPLETION | {"prompt": [[""] * 1000] * 2},
        {
            "inputs": "x",
            "parameters": {"merged_adapters": {"ids": ["a"], "weights": [""] * 1000}},
        },
    ],
)
def test_a_long_body_of_faults_has_few_errors_for_each_form(body: dict[str, Any]) -> None:
    model = next(m for field, m in MODELS.items() if field in body)
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() < 150


def test_a_list_in_the_place_of_a_text_is_not_looked_into() -> None:
    place, text = refused(GenerateRequest, {"inputs": ["\ud800"] * 1000})
    assert (place, text) == ("inputs", "Input should be a valid string")


def test_a_message_is_text_or_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert Message.model_validate({"role": "user", "content": parts}).text == "a\nb"
    with pytest.raises(ValidationError):
        Message.model_validate({"role": "user", "content": [{"type": "image_url"}]})
    assert refused(Message, {"role": "function", "content": "x"})[0] == "role"


@pytest.mark.parametrize(
    ("field", "place"),
    [
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "x", "function": {"name": "f"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]},
            "tools.0.function.x",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 129}, "tools"),
        ({"tool_choice": "any"}, "tool_choice.ToolChoiceWord"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.NamedTool.function"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "type": "function"}]}]},
            "messages.0.tool_calls.0.function",
        ),
    ],
)
def test_tools_that_are_written_badly(field: dict[str, Any], place: str) -> None:
    assert refused(ChatRequest, CHAT | field)[0] == place


@pytest.mark.parametrize(
    "answer",
    [
        ChatCompletionMessage(role="assistant", content="hello").model_dump(),
        ParsedChatCompletionMessage(
            role="assistant", content="hello", parsed={"a": 1}
        ).model_dump(),
        dict(ChatCompletionOutputMessage(role="assistant", content="hello")),
        {"role": "assistant", "content": "hello", "reasoning_content": None},
        {"role": "assistant", "content": "hello", "reasoning_content": "Let me greet."},
    ],
)
def test_an_answer_of_a_client_is_a_turn_of_the_next_request(answer: dict[str, Any]) -> None:
    assert Message.model_validate(answer).text == "hello"


@pytest.mark.parametrize(
    ("model", "params"),
    [
        (ChatRequest, ChatParams),
        (CompletionRequest, CompletionParams),
        (ResponseRequest, ResponseParams),
    ],
)
def test_every_parameter_of_openais_client_has_its_field(
    model: type[BaseModel], params: type
) -> None:
    """What is not served is known all the same: null passes, and a refusal says which it is."""
    assert set(params.__annotations__) <= set(model.model_fields)


@pytest.mark.parametrize(
    ("sent", "used"),
    [(7, 7), (-1, None), (-2, 2**64 - 2), (-(2**63), 2**63), (2**64 - 1, 2**64 - 1)],
)
def test_a_seed_is_any_number_of_64_bits(sent: int, used: int | None) -> None:
    for model, body in ((ChatRequest, CHAT), (CompletionRequest, COMPLETION)):
        assert model.model_validate(body | {"seed": sent}).seed == used
        for beyond in (2**64, -(2**63) - 1):
            assert refused(model, body | {"seed": beyond})[0] == "seed"


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


def test_null_is_what_a_field_is_without_it() -> None:
    source = AdapterSource.model_validate({"name": "a", "source": "b", "force": None})
    assert source == AdapterSource(name="a", source="b")
    part = WeightedAdapter.model_validate({"name": "a", "weight": None})
    assert part == WeightedAdapter(name="a")
    weight = WeightedAdapter.model_json_schema()["properties"]["weight"]
    number = {"type": "number", "minimum": -100, "maximum": 100}
    assert weight["anyOf"] == [number, {"type": "null"}]


def test_a_source_is_named() -> None:
    assert refused(AdapterSource, {"name": "a", "source": ""})[0] == "source"
