"""What a request offers to call, and what is refused."""

from typing import Any

import pytest

from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.generation import GrammarKind
from dynamic_lora_server.requests.prompts import chat_offer, chat_spec
from dynamic_lora_server.schemas.openai import ChatRequest
from dynamic_lora_server.text import TokenizerView
from dynamic_lora_server.tools.calls import FreeReader, GuidedReader
from dynamic_lora_server.tools.offer import Offer
from tests.support.models import tiny_tokenizer
from tests.support.tools import HERMES, SILENT, TOOLS, WEATHER, function, tokenizer_for

VIEW = TokenizerView(tiny_tokenizer())
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "time.now"}}
STRICT = [TOOLS[0], function("g", {}, strict=True)]
FORMAT = {"type": "json_object"}


def body(**fields: Any) -> ChatRequest:
    messages = [{"role": "user", "content": "hi"}]
    return ChatRequest.model_validate({"model": "m", "messages": messages, "tools": TOOLS} | fields)


def offer(template: str = HERMES, otherwise: str = "auto", **fields: Any) -> Offer | None:
    tokenizer = tokenizer_for(template)
    return chat_offer(body(**fields), tokenizer=tokenizer, view=VIEW, otherwise=otherwise)


@pytest.mark.parametrize(
    ("fields", "guided", "forced"),
    [
        ({}, False, False),
        ({"tool_choice": "auto", "parallel_tool_calls": True}, False, False),
        ({"parallel_tool_calls": False}, True, False),
        ({"tools": STRICT}, True, False),
        ({"tool_choice": "required"}, True, True),
        ({"tool_choice": NAMED}, True, True),
    ],
)
def test_what_the_answer_is_held_to(fields: dict[str, Any], guided: bool, forced: bool) -> None:
    found = offer(**fields)
    assert found is not None
    assert found.names == {tool["function"]["name"] for tool in fields.get("tools", TOOLS)}
    assert (found.grammar is not None, found.forced) == (guided, forced)
    assert isinstance(found.reader(), GuidedReader if forced else FreeReader)
    spec = chat_spec(body(**fields), adapter=None, tokenizer=tokenizer_for(HERMES), offer=found)
    assert spec.grammar == found.grammar
    assert spec.grammar is None or spec.grammar.kind is GrammarKind.CALLS
    assert spec.shown_tokens == ("<tool_call>", "</tool_call>")


@pytest.mark.parametrize(
    "fields", [{"tools": []}, {"tools": None, "tool_choice": "auto"}, {"tool_choice": "none"}]
)
def test_nothing_to_call(fields: dict[str, Any]) -> None:
    assert offer(**fields) is None
    spec = chat_spec(body(**fields), adapter=None, tokenizer=tokenizer_for(HERMES))
    assert ("[tools]" in spec.prompt) is bool(fields.get("tools", TOOLS))  # none: seen, not called
    assert spec.shown_tokens == ()


def test_the_servers_notation_counts_where_the_template_tells_none() -> None:
    found = offer(SILENT, "mistral")
    assert found is not None
    assert found.notation.name == "mistral"
    found = offer(HERMES, "mistral")
    assert found is not None
    assert found.notation.name == "hermes"


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"template": SILENT}, "tools", "--tool-call-format"),
        ({"template": tiny_tokenizer().chat_template}, "tools", "does not write tools"),
        ({"tools": [TOOLS[0], *TOOLS]}, "tools.1.function.name", "Two tools have the name"),
        ({"tools": [function("f", {"x": "y" * 2**17})]}, "tools", "131072 are allowed"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [], "tool_choice": NAMED}, "tool_choice", "there are no tools"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice.function.name",
            "none of the tools.*weather, time.now",
        ),
        (
            {"tools": [function("f"), function("g", {"type": "array"})], "tool_choice": "required"},
            "tools.1.function.parameters",
            "type 'array'",
        ),
        ({"response_format": FORMAT}, "response_format", "tool_choice to none"),
        ({"guided_regex": "a", "tool_choice": "required"}, "guided_regex", "may be a call"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos", "nothing may follow"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], field: str, message: str) -> None:
    template = fields.pop("template", HERMES)
    with pytest.raises(InvalidParameter) as caught:
        chat_spec(
            body(**fields),
            adapter=None,
            tokenizer=tokenizer_for(template),
            offer=offer(template, **fields),
        )
    assert caught.value.field == field
    text = f"{caught.value.message} {caught.value.fix}"
    assert all(part in text for part in message.split(".*"))


def test_with_none_a_text_may_be_held_to_a_format() -> None:
    asked = body(tool_choice="none", response_format=FORMAT)
    spec = chat_spec(asked, adapter=None, tokenizer=tokenizer_for(HERMES))
    assert spec.grammar is not None
    assert spec.grammar.field == "response_format"


def test_a_named_function_needs_no_other_schema() -> None:
    odd = function("odd", {"type": "array"})
    named = {"type": "function", "function": {"name": "weather"}}
    assert offer(tools=[odd, function("weather", WEATHER)], tool_choice=named) is not None
