"""The chat template of a trained adapter: chats are read as its prompts are."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dynamic_lora_adapters.files.chat import TEMPLATE_FILE, ChatFormat
from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.requests.chat_template import render
from dynamic_lora_server.schemas.openai import Message
from dynamic_lora_server.training import TrainingConfig, TrainingConfigError
from dynamic_lora_server.training.chat import build_chat_template
from tests.server.training.test_config import recipe
from tests.support.models import BOS, BOS_ID, EOS, EOS_ID, sentencepiece_tokenizer, tiny_tokenizer

TEXT = 'two\n{{ lines }} "quoted" \\ \u00e9 \U0001f600'


def config(**changes: Any) -> TrainingConfig:
    """A recipe with fields replaced."""
    return TrainingConfig.model_validate(recipe(**changes))


def with_specials(tokenizer: PreTrainedTokenizerFast, form: str) -> PreTrainedTokenizerFast:
    """The tokenizer with special tokens put around a prompt."""
    specials = [(BOS, BOS_ID), (EOS, EOS_ID)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=form, special_tokens=specials
    )
    return tokenizer


def chat(
    folder: Path, tokenizer: PreTrainedTokenizerFast, settings: TrainingConfig, *messages: Message
) -> str:
    """The messages through the template, as a server reads it from the adapter's folder."""
    template = build_chat_template(settings, tokenizer)
    assert template is not None
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    found = ChatFormat.read(folder)
    assert found is not None
    found.check()
    return render(messages, {}, tokenizer, found)


@pytest.mark.parametrize(
    "tokenizer",
    [
        tiny_tokenizer(),
        sentencepiece_tokenizer(),
        with_specials(tiny_tokenizer(), f"{BOS} $A"),
        with_specials(sentencepiece_tokenizer(), f"{BOS} $A"),
    ],
    ids=["plain", "pieces", "plain-bos", "pieces-bos"],
)
@pytest.mark.parametrize("prompt", ["{input}", '\n "{{a}}" \\n {% x %}: {input} \u00e9\nA:'])
def test_a_chat_is_read_as_the_prompt_is(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, prompt: str
) -> None:
    settings = config(prompt_template=prompt)
    text = chat(tmp_path, tokenizer, settings, Message(role="user", content=TEXT))
    read = tokenizer.encode(text, add_special_tokens=False)
    assert read == tokenizer.encode(settings.render(TEXT))


@pytest.mark.parametrize(
    "roles", [["system", "user"], ["user", "assistant", "user"], ["system"], ["user", "user"]]
)
def test_what_was_not_trained_is_refused(tmp_path: Path, roles: list[Any]) -> None:
    messages = [Message(role=role, content="x") for role in roles]
    with pytest.raises(InvalidParameter, match="trained on single inputs: send one user message"):
        chat(tmp_path, tiny_tokenizer(), config(), *messages)


def test_a_recipe_can_leave_chats_to_the_base() -> None:
    assert build_chat_template(config(chat_template=False), tiny_tokenizer()) is None


def test_a_tokenizer_that_reads_chats_otherwise_is_refused() -> None:
    closing = with_specials(tiny_tokenizer(), f"$A {EOS}")
    with pytest.raises(TrainingConfigError, match="chat_template: .*; set it to false"):
        build_chat_template(config(), closing)
