"""Task cards, defaults and chat templates: from a body to a spec."""

from typing import Any

import pytest

from dynamic_lora_adapters.card import TaskCard
from dynamic_lora_adapters.grammar import parse
from dynamic_lora_adapters.inspection import AdapterVersion
from dynamic_lora_adapters.passport import Passport
from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.generation import GenerationSpec
from dynamic_lora_server.prompts import (
    CHAT_TOKENS,
    adapter_name,
    card_of,
    chat_spec,
    completion_specs,
    generate_spec,
)
from dynamic_lora_server.schemas.generate import GenerateRequest
from dynamic_lora_server.schemas.openai import ChatRequest, CompletionRequest
from dynamic_lora_server.text import TokenizerView
from tests.support.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
VIEW = TokenizerView(TOKENIZER)
CARD = TaskCard.model_validate(
    {
        "prompt_template": "Text: {input}\nEntities:",
        "parameters": {"max_new_tokens": 7, "temperature": 0.5, "stop": ["\n"], "top_k": 3},
    }
)


def generate(
    parameters: dict[str, Any] | None = None, *, card: TaskCard | None = None, stream: bool = False
) -> GenerationSpec:
    body = GenerateRequest.model_validate(
        {"inputs": "the rain", "parameters": parameters or {}, "stream": stream}
    )
    return generate_spec(body, adapter="ner", card=card)


def test_without_a_card_the_prompt_is_the_input_and_decoding_is_greedy() -> None:
    spec = generate()
    assert spec.prompt == "the rain"
    assert spec.sampling.greedy
    assert spec.sampling.max_new_tokens == 100
    assert not spec.sampling.logprobs


def test_a_card_wraps_the_input_and_gives_defaults() -> None:
    spec = generate(card=CARD)
    assert spec.prompt == "Text: the rain\nEntities:"
    assert spec.stop == ("\n",)
    assert (spec.sampling.max_new_tokens, spec.sampling.temperature) == (7, 0.5)
    assert spec.sampling.top_k == 3


def test_the_request_wins_over_the_card_and_null_does_not() -> None:
    spec = generate(
        {"max_new_tokens": 9, "stop": ["x"], "temperature": 0.0, "top_k": None}, card=CARD
    )
    assert spec.sampling.max_new_tokens == 9
    assert spec.stop == ("x",)
    assert spec.sampling.greedy
    assert spec.sampling.top_k == 3


@pytest.mark.parametrize(
    ("parameters", "card_parameters", "temperature"),
    [
        ({}, {}, 0.0),
        ({"do_sample": True}, {}, 1.0),
        ({"temperature": 0.7}, {}, 0.7),
        ({"temperature": 0.7, "do_sample": False}, {}, 0.7),
        ({}, {"do_sample": True}, 1.0),
        ({}, {"temperature": 0.3}, 0.3),
        ({"do_sample": False}, {"temperature": 0.3}, 0.0),
        ({"do_sample": True}, {"temperature": 0.3}, 0.3),
        ({"do_sample": True}, {"temperature": 0.0}, 1.0),
        ({"temperature": 0.0}, {"do_sample": True}, 0.0),
        ({"temperature": 5e-324}, {}, 0.0),
    ],
)
def test_when_decoding_is_greedy(
    parameters: dict[str, Any], card_parameters: dict[str, Any], temperature: float
) -> None:
    card = TaskCard.model_validate({"parameters": card_parameters})
    assert generate(parameters, card=card).sampling.temperature == temperature


@pytest.mark.parametrize(
    ("parameters", "stream", "field", "text"),
    [
        ({"do_sample": True, "temperature": 0.0}, False, "parameters.temperature", "greedy"),
        ({"do_sample": True, "temperature": 1e-9}, False, "parameters.temperature", "1e-09 is"),
        ({"n": 2}, False, "parameters.n", "details"),
        ({"n": 2, "details": True}, True, "parameters.n", "one continuation"),
        ({"top_n_tokens": 2}, False, "parameters.top_n_tokens", "details"),
    ],
)
def test_contradictions_are_refused_by_name(
    parameters: dict[str, Any], stream: bool, field: str, text: str
) -> None:
    with pytest.raises(InvalidParameter, match=text) as caught:
        generate(parameters, stream=stream)
    assert caught.value.field == field


def test_details_and_streams_ask_for_logprobs() -> None:
    assert generate({"details": True, "top_n_tokens": 4}).sampling.top_logprobs == 4
    assert generate({"details": True}).sampling.logprobs
    assert generate(stream=True).sampling.logprobs


def test_truncate_is_for_the_service() -> None:
    """The text stays whole: nothing is tokenised on the event loop."""
    spec = generate({"truncate": 3}, card=CARD)
    assert (spec.prompt, spec.keep_last) == ("Text: the rain\nEntities:", 3)
    assert generate().keep_last is None


def test_the_base_model_has_several_names() -> None:
    assert adapter_name("base", model_id="org/m") is None
    assert adapter_name("org/m", model_id="org/m") is None
    assert adapter_name(None, model_id="org/m") is None
    assert adapter_name("ner", model_id="org/m") == "ner"


def version(name: str, card: TaskCard | None) -> AdapterVersion:
    return AdapterVersion(name=name, digest="", passport=Passport.model_construct(), card=card)


OTHER = CARD.model_copy(update={"prompt_template": "Other: {input}"})
TWIN = CARD.model_copy(update={"description": "asks as CARD does"})


@pytest.mark.parametrize(
    ("text", "cards", "expected"),
    [
        ("a", [CARD], CARD),
        ("a*0.5", [CARD], CARD),
        ("a+b", [CARD, TWIN], CARD),
        ("a+b", [CARD, OTHER], None),
        ("a+b", [CARD, None], None),
        ("a - b", [CARD, OTHER], CARD),
        ("-a", [CARD], None),
        ("a - a", [], None),
    ],
)
def test_the_card_of_a_composition(
    text: str, cards: list[TaskCard | None], expected: TaskCard | None
) -> None:
    versions = [version(str(i), card) for i, card in enumerate(cards)]
    assert card_of(parse(text), versions) == expected


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hi", ["hi"]),
        ([5, 6], [(5, 6)]),
        (["hi", "ho"], ["hi", "ho"]),
        ([[5], [6, 7]], [(5,), (6, 7)]),
    ],
)
def test_completion_prompts(prompt: Any, prompts: list[Any]) -> None:
    body = CompletionRequest.model_validate({"model": "m", "prompt": prompt, "stop": "x"})
    specs = completion_specs(body, adapter=None)
    assert [spec.prompt for spec in specs] == prompts
    assert {(spec.sampling.temperature, spec.sampling.max_new_tokens) for spec in specs} == {
        (1.0, 16)
    }
    assert specs[0].stop == ("x",)


def chat(**fields: Any) -> GenerationSpec:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    body = ChatRequest.model_validate({"model": "m", "messages": messages} | fields)
    return chat_spec(body, adapter=None, tokenizer=TOKENIZER, view=VIEW, context_length=512)


@pytest.mark.parametrize("kept", [True, False, None])
def test_the_stop_string_may_stay_in_the_text(kept: bool | None) -> None:
    fields = {"stop": "x", "include_stop_str_in_output": kept}
    body = CompletionRequest.model_validate({"model": "m", "prompt": "a"} | fields)
    (completion,) = completion_specs(body, adapter=None)
    assert completion.include_stop is chat(**fields).include_stop is bool(kept)


def test_chat_uses_the_template_and_what_the_context_has_left() -> None:
    spec = chat()
    assert isinstance(spec.prompt, tuple)
    assert TOKENIZER.decode(list(spec.prompt)) == "[user] hi\n[assistant]"
    assert spec.sampling.max_new_tokens == min(CHAT_TOKENS, 512 - len(spec.prompt))
    assert chat(max_completion_tokens=3).sampling.max_new_tokens == 3


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_chat_contradictions_are_refused_by_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        chat(**fields)
    assert caught.value.field == field


def test_a_template_that_refuses_and_one_that_is_missing() -> None:
    body = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    )
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(InvalidParameter, match="no users here"):
        chat_spec(body, adapter=None, tokenizer=tokenizer, view=VIEW, context_length=512)
    tokenizer.chat_template = None
    with pytest.raises(InvalidParameter, match="no chat template"):
        chat_spec(body, adapter=None, tokenizer=tokenizer, view=VIEW, context_length=512)
