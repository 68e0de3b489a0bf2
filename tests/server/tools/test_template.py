"""What chat templates make of tools."""

import pytest

from dynamic_lora_server.tools.notation import HERMES
from dynamic_lora_server.tools.template import TemplateTools, template_tools
from tests.support.models import tiny_tokenizer
from tests.support.tools import INSTRUCTIONS, SILENT, TEMPLATES


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_tells_how_calls_are_written(name: str) -> None:
    found = template_tools(TEMPLATES[name], {})
    assert found.notation is not None
    assert found.notation.name == name
    assert (found.offers, found.calls, found.results) == (True, True, True)


def test_instructions_tell_it_where_no_call_is_written() -> None:
    assert template_tools(INSTRUCTIONS, {}) == TemplateTools(
        offers=True, calls=False, results=True, notation=HERMES
    )
    assert template_tools(SILENT, {}).notation is None


def test_a_template_that_never_mentions_tools() -> None:
    found = template_tools(tiny_tokenizer().chat_template, {})
    assert (found.offers, found.calls, found.notation) == (False, False, None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('{"name": "', '<function={"name": "'),  # another notation between the same markers
        ("<tool_call>", "<|tool_call|>"),
        ('"name": "', '"function": "'),
    ],
)
def test_other_notations_are_not_taken_for_a_known_one(old: str, new: str) -> None:
    found = template_tools(TEMPLATES["hermes"].replace(old, new), {})
    assert (found.calls, found.notation) == (True, None)


def test_a_bare_call_is_one_only_where_words_would_stand() -> None:
    marked = TEMPLATES["llama3"].replace('[assistant] {"name"', '[assistant] <|call|>{"name"')
    assert template_tools(marked, {}).notation is None


def test_a_template_that_refuses_to_be_tried() -> None:
    found = template_tools("{{ raise_exception('no') }}", {})
    assert found == TemplateTools(offers=False, calls=False, results=False, notation=None)


def test_templates_find_special_tokens() -> None:
    template = "{{ bos_token + 'x' }}" + TEMPLATES["hermes"]
    assert template_tools(template, {"bos_token": "<s>"}).offers
    assert not template_tools(template, {}).offers
