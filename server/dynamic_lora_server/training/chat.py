"""The chat template of a trained adapter: one user message, in the recipe's prompt."""

import json

from transformers import PreTrainedTokenizerBase

from dynamic_lora_adapters.files.card import PLACEHOLDER
from dynamic_lora_server.training.config import TrainingConfig
from dynamic_lora_server.training.errors import TrainingConfigError

# What was not trained is refused: a system message or an earlier turn would go unread.
_TEMPLATE = """\
{{%- if messages | length != 1 or messages[0].role != "user" -%}}
{{{{- raise_exception("the adapter was trained on single inputs: send one user message") -}}}}
{{%- endif -%}}
{{{{- {head} ~ messages[0].content ~ {tail} -}}}}
"""


def build_chat_template(config: TrainingConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The jinja template that renders a chat as the prompt that is trained; None if not wanted.

    Raises TrainingConfigError where the tokenizer would read another prompt in it.
    """
    if not config.chat_template:
        return None
    head, tail = config.prompt_template.split(PLACEHOLDER)
    template = _TEMPLATE.format(head=_literal(_opening(tokenizer) + head), tail=_literal(tail))
    text = config.card.example.input
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], chat_template=template, tokenize=False
    )
    # A chat's special tokens stand in its text, a prompt's are put around it.
    read = tokenizer.encode(str(chat), add_special_tokens=False)
    if read != tokenizer.encode(config.render(text)):
        raise TrainingConfigError(
            "chat_template: the base's tokenizer reads a chat in this prompt_template otherwise "
            "than the prompt alone; set it to false"
        )
    return template


def _opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special tokens that the tokenizer puts before a prompt, as text."""
    return str(tokenizer.decode(tokenizer.encode("")))


def _literal(text: str) -> str:
    """A string in jinja, whose escapes are JSON's."""
    return json.dumps(text, ensure_ascii=False)
