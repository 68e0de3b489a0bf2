"""Messages through a chat template: an adapter's own, or the base model's."""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any, Protocol

from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.schemas.openai import Message

if TYPE_CHECKING:
    from dynamic_lora_adapters.chat import ChatFormat


class Tokenizer(Protocol):
    """What templates need of a transformers tokenizer."""

    chat_template: Any

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        chat_template: str | None,
        add_generation_prompt: bool,
        tokenize: bool,
        **variables: Any,
    ) -> Any:
        """The conversation as the text the model was trained on."""


def render(
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    tokenizer: Tokenizer,
    chat: "ChatFormat | None",
) -> str:
    """The text of a conversation, up to where the model's turn begins.

    `chat` is an adapter's; its template goes before the base model's. `variables` are what the
    request gives to the template. Raises InvalidParameter when the template refuses the messages
    or there is none.
    """
    own = None if chat is None else chat.template
    if own is None and not tokenizer.chat_template:
        raise InvalidParameter(
            "The base model has no chat template, nor has the adapter.",
            field="messages",
            fix="Write the whole prompt yourself and use /v1/completions or /generate.",
        )
    _check_variables(variables)
    if chat is not None and own is not None:
        variables = {**chat.special_tokens, **variables}
    conversation = [_turn(message) for message in messages]
    try:
        text = str(
            tokenizer.apply_chat_template(
                conversation,
                chat_template=own,
                add_generation_prompt=True,
                tokenize=False,
                **variables,
            )
        )
        text.encode()  # a template can write half of a character, which no tokenizer takes
    except Exception as error:
        # A template is a program: on messages it was not written for, any error can come of it.
        raise InvalidParameter(
            f"The {'base model' if own is None else 'adapter'}'s chat template refuses these "
            f"messages: {str(error) or type(error).__name__}.",
            field="messages",
        ) from error
    return text


def _turn(message: Message) -> dict[str, str]:
    """A message as templates know it: without what it does not say."""
    # OpenAI renamed the system for its newer models; templates know the old name.
    role = "system" if message.role == "developer" else message.role
    turn = {"role": role, "content": message.text}
    if message.name is not None:
        turn["name"] = message.name
    thought = message.reasoning_content if message.reasoning is None else message.reasoning
    if thought is not None:
        turn |= {"reasoning": thought, "reasoning_content": thought}  # templates read either
    return turn


def _check_variables(variables: Mapping[str, Any]) -> None:
    """Raise InvalidParameter for what is no variable, but would change how a template is used."""
    from transformers import PreTrainedTokenizerBase

    settings = signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    for name in variables:
        if name in settings or name == "messages":
            raise InvalidParameter(
                f"chat_template_kwargs holds {name!r}, which is no variable of a template's own.",
                field="chat_template_kwargs",
                fix="Leave it out.",
            )
