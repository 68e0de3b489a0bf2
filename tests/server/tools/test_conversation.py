"""Calls and results among the messages of a conversation."""

from typing import Any

import pytest

from dynamic_lora_adapters.files.chat import ChatFormat
from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.requests.chat_template import render
from dynamic_lora_server.schemas.openai import ChatRequest
from tests.support.models import tiny_tokenizer
from tests.support.tools import (
    HERMES,
    INSTRUCTIONS,
    LLAMA3,
    MISTRAL,
    TOOLS,
    call,
    function,
    tokenizer_for,
)

USER = {"role": "user", "content": "Weather?"}
CALL = call("weather", '{"city": "Köln", "days": 2}')
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": CALL["id"], "content": "rain"}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('{"a": 1, "a": 2}', '{"a": 2}'),
        (r'{"a": "\ud83d", "b": "\ud83d\ude00"}', '{"a": "?", "b": "😀"}'),
    ],
)
def test_what_a_model_wrote_oddly_can_be_sent_back(written: str, read: str) -> None:
    odd, plain = (
        prompt(HERMES, [USER, {**CALLED, "tool_calls": [call("weather", text)]}, RESULT])
        for text in (written, read)
    )
    assert odd == plain
    assert f'"arguments": {read}}}' in odd


def prompt(template: str | None, messages: list[Any], **more: Any) -> str:
    tokenizer = tiny_tokenizer() if template is None else tokenizer_for(template)
    body = ChatRequest.model_validate({"model": "m", "messages": messages} | more)
    return render(body.messages, {}, tokenizer, None, body)


def test_tools_are_written_as_transformers_has_them() -> None:
    tools = [function("f", None, description="Does.", strict=True), function("g", {})]
    text = prompt(HERMES, [USER], tools=tools, tool_choice="none")
    assert text == (
        '[tools] {"type": "function", "function": {"name": "f", "description": "Does.", '
        '"parameters": {"type": "object", "properties": {}}}}\n'
        '{"type": "function", "function": {"name": "g", '
        '"parameters": {"type": "object", "properties": {}}}}\n'
        "[user] Weather?\n[assistant] "
    )


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (
            HERMES,
            '[assistant] \n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", '
            '"days": 2}}\n</tool_call>\n',
        ),
        (
            LLAMA3,
            '[assistant] {"name": "weather", "parameters": {"city": "Köln", "days": 2}}\n',
        ),
    ],
)
def test_earlier_calls_are_objects_and_results_follow(template: str, written: str) -> None:
    text = prompt(template, [USER, CALLED, RESULT])
    assert text == f"[user] Weather?\n{written}[result] rain\n[assistant] "


def test_a_result_is_told_its_function_and_its_call() -> None:
    template = (
        HERMES + "{{ messages[2].name }} {{ messages[2].tool_call_id }} {{ messages[1].content }}|"
    )
    assert prompt(template, [USER, CALLED, RESULT]).endswith("[assistant] weather call_00001 |")


def test_what_clients_add_to_a_call_changes_nothing() -> None:
    own = {**CALL["function"], "description": None, "parsed_arguments": {"city": 1}}
    added = {**CALLED, "tool_calls": [{**CALL, "index": 0, "function": own}]}
    assert prompt(HERMES, [USER, added, RESULT]) == prompt(HERMES, [USER, CALLED, RESULT])


def test_a_call_without_arguments() -> None:
    called = {**CALLED, "content": "So.", "tool_calls": [call("time.now", "")]}
    text = prompt(HERMES, [USER, called, RESULT])
    assert '[assistant] So.\n<tool_call>\n{"name": "time.now", "arguments": {}}' in text


@pytest.mark.parametrize(
    ("template", "body", "field", "message"),
    [
        (None, {"messages": [USER], "tools": TOOLS}, "tools", "model's chat template does not"),
        (None, {"messages": [USER, CALLED]}, "messages", "does not write calls of earlier turns"),
        (INSTRUCTIONS, {"messages": [USER, CALLED, RESULT]}, "messages", "calls of earlier"),
        (
            "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls }}{% endif %}{% endfor %}",
            {"messages": [USER, CALLED, RESULT]},
            "messages",
            "results of calls",
        ),
        (MISTRAL, {"messages": [USER, CALLED, RESULT]}, "messages", "nine characters"),
        (
            LLAMA3,
            {"messages": [USER, {**CALLED, "tool_calls": [CALL, call("f", "{}", "b")]}]},
            "messages",
            "one call at a time",
        ),
    ],
)
def test_a_template_that_would_leave_something_out_is_named(
    template: str | None, body: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(InvalidParameter, match=message) as caught:
        prompt(template, **body)
    assert caught.value.field == field


def test_the_adapters_template_counts() -> None:
    body = ChatRequest.model_validate({"model": "m", "messages": [USER], "tools": TOOLS})
    adapter = ChatFormat(template=HERMES)
    assert render(body.messages, {}, tiny_tokenizer(), adapter, body).startswith("[tools] ")
    plain = ChatFormat(template=tiny_tokenizer().chat_template)
    with pytest.raises(InvalidParameter, match="The adapter's chat template does not write tools"):
        render(body.messages, {}, tokenizer_for(HERMES), plain, body)


def test_of_several_templates_that_for_tools_is_used() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": HERMES}
    body = ChatRequest.model_validate({"model": "m", "messages": [USER], "tools": TOOLS})
    assert render(body.messages, {}, tokenizer, None, body).startswith("[tools] ")
    tokenizer.chat_template = {"other": HERMES}
    with pytest.raises(InvalidParameter, match="no chat template for this"):
        render(body.messages, {}, tokenizer, None, body)


def calls(*arguments: str, call_id: str = "a") -> dict[str, Any]:
    return {**CALLED, "tool_calls": [call("f", one, call_id) for one in arguments]}


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "assistant", "content": None}], "messages.0.content"),
        ([USER, {**CALLED, "tool_calls": []}], "messages.1.content"),
        ([USER, {**USER, "tool_calls": [CALL]}], "messages.1.tool_calls"),
        ([USER, {**USER, "tool_call_id": "a"}], "messages.1.tool_call_id"),
        ([USER, calls("{")], "messages.1.tool_calls.0.function.arguments"),
        ([USER, calls("{}", "[1]")], "messages.1.tool_calls.1.id"),
        ([USER, calls("[1]")], "messages.1.tool_calls.0.function.arguments"),
        ([USER, calls("[" * 10**5)], "messages.1.tool_calls.0.function.arguments"),
        ([USER, RESULT], "messages.1.tool_call_id"),
        ([USER, CALLED, {**RESULT, "tool_call_id": "b"}], "messages.2.tool_call_id"),
        ([USER, CALLED, {"role": "tool", "content": "x"}], "messages.2.tool_call_id"),
        (
            [USER, CALLED, {"role": "assistant", "content": "So."}, RESULT],
            "messages.3.tool_call_id",
        ),
        ([USER, CALLED, {**RESULT, "content": None}], "messages.2.content"),
    ],
)
def test_messages_that_do_not_go_together(messages: list[Any], field: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        prompt(HERMES, messages)
    assert caught.value.field == field


BEGUN = [USER, {"role": "assistant", "content": "It is "}]


def test_where_the_text_ends() -> None:
    said = "[user] Weather?\n[assistant] It is"
    assert prompt(HERMES, BEGUN) == f"{said} \n[assistant] "
    assert prompt(HERMES, BEGUN, continue_final_message=True) == f"{said} "
    assert prompt(HERMES, BEGUN, add_generation_prompt=False) == f"{said} \n"
    both = {"continue_final_message": True, "add_generation_prompt": False}
    assert prompt(HERMES, BEGUN, **both, tools=TOOLS).endswith(f"\n{said} ")


@pytest.mark.parametrize(
    ("messages", "more", "field"),
    [
        (BEGUN, {"add_generation_prompt": True}, "add_generation_prompt"),
        ([USER], {}, "continue_final_message"),
        ([USER, CALLED], {}, "continue_final_message"),
    ],
)
def test_what_cannot_go_on(messages: list[Any], more: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        prompt(HERMES, messages, continue_final_message=True, **more)
    assert caught.value.field == field
