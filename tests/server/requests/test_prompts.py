"""Task cards, defaults and chat templates: from a body to a spec."""

from collections.abc import Iterator
from typing import Any

import pytest

from dynamic_lora_adapters.files.card import TaskCard
from dynamic_lora_adapters.files.chat import ChatFormat
from dynamic_lora_adapters.files.template_process import TemplateProcesses
from dynamic_lora_server.errors import InvalidParameter, ServerError
from dynamic_lora_server.generation import GenerationSpec
from dynamic_lora_server.requests import chat_template
from dynamic_lora_server.requests.prompts import (
    CHAT_TOKENS,
    chat_offer,
    chat_spec,
    completion_specs,
    generate_spec,
)
from dynamic_lora_server.requests.stopped_templates import StoppedTemplates
from dynamic_lora_server.schemas.generate import GenerateRequest
from dynamic_lora_server.schemas.openai import ChatRequest, CompletionRequest
from dynamic_lora_server.tools import template
from tests.support.models import tiny_tokenizer
from tests.support.tools import TEMPLATES

TOKENIZER = tiny_tokenizer()
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


def test_no_stop_string_is_none_that_is_given() -> None:
    """TGI's and LoRAX's clients always send a list."""
    assert generate({"stop": []}, card=CARD).stop == ("\n",)
    assert generate({"stop": []}).stop == ()


@pytest.mark.parametrize(
    ("parameters", "card_parameters", "temperature"),
    [
        ({}, {}, 0.0),
        ({"do_sample": True}, {}, 1.0),
        ({"temperature": 0.7}, {}, 0.7),
        ({"temperature": 0.7, "do_sample": False}, {}, 0.7),
        ({}, {"do_sample": True}, 1.0),
        ({}, {"temperature": 0.3}, 0.3),
        ({"do_sample": False}, {"temperature": 0.3}, 0.3),
        ({"do_sample": False}, {"do_sample": True}, 1.0),
        ({"do_sample": False}, {}, 0.0),
        ({"do_sample": True}, {"temperature": 0.3}, 0.3),
        ({"do_sample": True}, {"temperature": 0.0}, 1.0),
        ({"temperature": 0.0}, {"do_sample": True}, 0.0),
        ({"temperature": 5e-324}, {}, 0.0),
        ({"top_p": 0.9}, {}, 1.0),
        ({"top_k": 5}, {}, 1.0),
        ({"min_p": 0.1}, {}, 1.0),
        ({"top_p": 1.0, "top_k": 0, "min_p": 0.0}, {}, 0.0),
        ({"seed": 3}, {}, 0.0),
        ({"top_p": 0.9, "temperature": 0.0}, {}, 0.0),
        ({"top_p": 0.9, "do_sample": False}, {}, 1.0),
        ({"top_p": 0.9}, {"temperature": 0.3}, 0.3),
        ({"top_p": 0.9}, {"temperature": 0.0}, 0.0),
        ({"top_p": 0.9}, {"do_sample": False}, 1.0),
        ({}, {"top_p": 0.9}, 0.0),
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


def test_only_a_limit_that_was_asked_for_is_kept_to() -> None:
    """A card's is a default, as the server's own are."""
    assert generate().clip_output
    assert generate(card=CARD).clip_output
    assert not generate({"max_new_tokens": 9}, card=CARD).clip_output
    assert chat().clip_output
    assert not chat(max_tokens=9).clip_output
    body = {"model": "m", "prompt": "hi"}
    asked = [
        completion_specs(CompletionRequest.model_validate(body | more), adapter=None)[0].clip_output
        for more in ({}, {"max_tokens": 9})
    ]
    assert asked == [True, False]


def test_details_and_streams_ask_for_logprobs() -> None:
    assert generate({"details": True, "top_n_tokens": 4}).sampling.top_logprobs == 4
    assert generate({"top_n_tokens": 4}, stream=True).sampling.top_logprobs == 4
    assert generate({"details": True}).sampling.logprobs
    assert generate(stream=True).sampling.logprobs


def test_truncate_is_for_the_service() -> None:
    """The text stays whole: nothing is tokenised on the event loop."""
    spec = generate({"truncate": 3}, card=CARD)
    assert (spec.prompt, spec.keep_last) == ("Text: the rain\nEntities:", 3)
    assert generate().keep_last is None


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
    return chat_spec(body, adapter=None, tokenizer=TOKENIZER)


@pytest.mark.parametrize("kept", [True, False, None])
def test_the_stop_string_may_stay_in_the_text(kept: bool | None) -> None:
    fields = {"stop": "x", "include_stop_str_in_output": kept}
    body = CompletionRequest.model_validate({"model": "m", "prompt": "a"} | fields)
    (completion,) = completion_specs(body, adapter=None)
    assert completion.include_stop is chat(**fields).include_stop is bool(kept)


def test_chat_uses_the_template() -> None:
    spec = chat()
    assert spec.prompt == "[user] hi\n[assistant]"
    assert not spec.add_special_tokens
    assert spec.sampling.max_new_tokens == CHAT_TOKENS
    assert chat(max_completion_tokens=3).sampling.max_new_tokens == 3


def test_a_developer_speaks_as_the_system() -> None:
    spec = chat(messages=[{"role": "developer", "content": "be brief"}])
    assert spec.prompt == "[system] be brief\n[assistant]"


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_a_template_gets_names_and_thoughts(field: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.name or m.role }}: "
        "{{ m.reasoning }}{{ m.reasoning_content }}{{ m.content }} {% endfor %}"
    )
    messages = [
        {"role": "user", "content": "hi", "name": "ann"},
        {"role": "assistant", "content": "ho", field: "(hm)", "name": None},
    ]
    body = ChatRequest.model_validate({"model": "m", "messages": messages})
    spec = chat_spec(body, adapter=None, tokenizer=tokenizer)
    assert spec.prompt == "ann: hi assistant: (hm)(hm)ho "


@pytest.mark.parametrize(("asked", "top_k"), [(-1, 0), (0, 0), (5, 5), (None, 0)])
def test_top_k_is_off_by_two_numbers(asked: int | None, top_k: int) -> None:
    assert chat(top_k=asked).sampling.top_k == top_k
    body = CompletionRequest.model_validate({"model": "m", "prompt": "hi", "top_k": asked})
    assert completion_specs(body, adapter=None)[0].sampling.top_k == top_k


def test_variables_of_the_template() -> None:
    body = ChatRequest.model_validate(
        {
            "model": "m",
            "messages": [{"role": "user", "content": "hi"}],
            "chat_template_kwargs": {"enable_thinking": False},
        }
    )
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ 'thinking' if enable_thinking is not false else 'plain' }}"
    assert chat_spec(body, adapter=None, tokenizer=tokenizer).prompt == "plain"


@pytest.mark.parametrize("name", ["chat_template", "tools", "tokenize", "messages", "self"])
def test_a_setting_is_no_variable_of_the_template(name: str) -> None:
    with pytest.raises(InvalidParameter, match=name) as caught:
        chat(chat_template_kwargs={name: None})
    assert caught.value.field == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        (
            {"stream_options": {"continuous_usage_stats": True}, "stream": True},
            "stream_options.continuous_usage_stats",
        ),
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
        chat_spec(body, adapter=None, tokenizer=tokenizer)
    for broken in (
        "{{ messages[0]['content'] + 1 }}",  # TypeError
        "{{ messages[0]['content'] / 0 }}",
        "{% for a in range(10**9) %}x{% endfor %}",  # OverflowError
        r"{{ '\ud83d' }}",
    ):
        tokenizer.chat_template = broken
        with pytest.raises(InvalidParameter, match="template refuses") as caught:
            chat_spec(body, adapter=None, tokenizer=tokenizer)
        assert caught.value.field == "messages"
    tokenizer.chat_template = None
    with pytest.raises(InvalidParameter, match="has no chat template"):
        chat_spec(body, adapter=None, tokenizer=tokenizer)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Renderings that may take a tenth of a second, and no template that was stopped yet."""
    processes = TemplateProcesses(seconds=0.1)
    monkeypatch.setattr(chat_template, "PROCESSES", processes)
    monkeypatch.setattr(template, "PROCESSES", processes)
    monkeypatch.setattr(chat_template, "_STOPPED", StoppedTemplates())
    yield
    processes.close()


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.usefixtures("hasty")
def test_an_adapters_template_that_takes_too_much_is_named_and_left_alone() -> None:
    body = ChatRequest.model_validate(
        {"model": "sql", "messages": [{"role": "user", "content": "hi"}]}
    )
    chat = ChatFormat(template=ENDLESS)
    with pytest.raises(InvalidParameter) as caught:
        chat_spec(body, adapter="sql", tokenizer=TOKENIZER, chat=chat)
    assert caught.value.field == "messages"
    assert caught.value.message == (
        "The chat template of 'sql' was stopped: it computes for more than 0.1 s."
    )
    with pytest.raises(InvalidParameter, match="'sql' took more time or memory") as again:
        chat_spec(body, adapter="sql", tokenizer=TOKENIZER, chat=chat)
    assert again.value.fix == "Mend it; the server tries this one again in 60 s."
    assert chat_spec(body, adapter=None, tokenizer=TOKENIZER).prompt == "[user] hi\n[assistant]"


@pytest.mark.usefixtures("hasty")
def test_so_is_one_that_takes_too_much_of_tools() -> None:
    function = {"name": "f", "parameters": {"type": "object"}}
    body = ChatRequest.model_validate(
        {
            "model": "sql",
            "messages": [{"role": "user", "content": "hi"}],
            "tools": [{"type": "function", "function": function}],
        }
    )
    chat = ChatFormat(template="{% if tools %}" + ENDLESS + "{% endif %}")
    view: Any = None  # which only a template that writes tools needs
    for why in ("'sql' was stopped: it computes", "'sql' took more time"):
        with pytest.raises(InvalidParameter, match=why):
            chat_offer(
                body,
                tokenizer=TOKENIZER,
                view=view,
                otherwise="hermes",
                adapter="sql",
                chat=chat,
            )


QUADRATIC = (
    "{% for a in messages %}{% for b in messages %}{% endfor %}{% endfor %}"
    "{{ messages[0].content }}"
)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("template", "fields", "why"),
    [
        (QUADRATIC, {"messages": [{"role": "user", "content": "hi"}] * 16_384}, "was stopped"),
        (
            "{{ 'a' * (width or 1) }}",
            {"chat_template_kwargs": {"width": 10**10}},
            "was stopped: it takes more memory",
        ),
        (
            "{{ 'a' * (width or 1) }}",
            {"chat_template_kwargs": {"width": 10**7}},
            "refuses these messages: it would write more than 1,0",
        ),
    ],
)
def test_a_request_that_asks_too_much_of_a_sound_template_is_refused_alone(
    template: str, fields: dict[str, Any], why: str
) -> None:
    small = {"model": "sql", "messages": [{"role": "user", "content": "hi"}]}
    chat = ChatFormat(template=template)
    with pytest.raises(InvalidParameter, match=why):
        chat_spec(
            ChatRequest.model_validate(small | fields),
            adapter="sql",
            tokenizer=TOKENIZER,
            chat=chat,
        )
    asked = ChatRequest.model_validate(small)
    spec = chat_spec(asked, adapter="sql", tokenizer=TOKENIZER, chat=chat)
    assert spec.prompt in ("hi", "a")


@pytest.mark.usefixtures("hasty")
def test_a_process_that_fails_is_the_servers_fault_and_no_templates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    body = ChatRequest.model_validate(
        {"model": "sql", "messages": [{"role": "user", "content": "hi"}]}
    )
    chat = ChatFormat(template=QUADRATIC)
    with monkeypatch.context() as patched:
        patched.setattr("sys.executable", "/bin/false")
        with pytest.raises(ServerError, match="'sql' could not be rendered: the process") as caught:
            chat_spec(body, adapter="sql", tokenizer=TOKENIZER, chat=chat)
    assert type(caught.value) is ServerError
    assert chat_spec(body, adapter="sql", tokenizer=TOKENIZER, chat=chat).prompt == "hi"


def test_tools_that_become_too_much_text_are_refused_alone() -> None:
    parameters: dict[str, Any] = {"enum": ["a"] * 20_000}
    for _ in range(95):
        parameters = {"p": parameters}
    indented = TEMPLATES["hermes"].replace("tool | tojson", "tool | tojson(indent=4)")
    body = {"model": "sql", "messages": [{"role": "user", "content": "hi"}]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    chat = ChatFormat(template=indented)
    with pytest.raises(InvalidParameter, match="it would write more than"):
        chat_spec(
            ChatRequest.model_validate(body | {"tools": [tool]}),
            adapter="sql",
            tokenizer=TOKENIZER,
            chat=chat,
        )
    asked = ChatRequest.model_validate(body)
    assert "hi" in chat_spec(asked, adapter="sql", tokenizer=TOKENIZER, chat=chat).prompt


@pytest.mark.usefixtures("hasty")
def test_the_base_models_template_is_everybodys_and_tried_each_time() -> None:
    body = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    )
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ENDLESS
    for _ in range(2):
        with pytest.raises(InvalidParameter, match="base model's chat template was stopped"):
            chat_spec(body, adapter=None, tokenizer=tokenizer)
