"""Messages through a chat template: an adapter's own, or the base model's."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, Protocol

from dynamic_lora_adapters.files.template_process import (
    PROCESSES,
    TemplateProcessFailed,
    TemplateRefused,
    TemplateStopped,
)
from dynamic_lora_server.errors import InvalidParameter, ServerError
from dynamic_lora_server.requests.stopped_templates import StoppedTemplates
from dynamic_lora_server.schemas.openai import Message
from dynamic_lora_server.schemas.tools import TemplateRequest
from dynamic_lora_server.tools.conversation import has_calls, has_results, with_calls
from dynamic_lora_server.tools.offer import described
from dynamic_lora_server.tools.template import TemplateTools, takes_too_much, template_tools

if TYPE_CHECKING:
    from dynamic_lora_adapters.files.chat import ChatFormat


_NOTHING_MORE = TemplateRequest()
_STOPPED = StoppedTemplates()


class Ending(Enum):
    """Where the text of a conversation ends."""

    NEW_TURN = auto()  # where the model's turn begins
    LAST_TURN = auto()  # in the last message, which the model is to go on from
    NOTHING = auto()  # behind the last message


class Tokenizer(Protocol):
    """What templates need of a transformers tokenizer."""

    chat_template: Any

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        """What templates find under the names of special tokens."""

    def get_chat_template(
        self, chat_template: str | None = None, tools: list[Any] | None = None
    ) -> str:
        """The template that is used: of several, there may be one for tools."""


def render(
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    tokenizer: Tokenizer,
    chat: "ChatFormat | None",
    asked: TemplateRequest = _NOTHING_MORE,
    *,
    adapter: object = None,
) -> str:
    """The text of a conversation, up to where the model's turn begins or goes on.

    `chat` is that of `adapter`; its template goes before the base model's. `variables` are what the
    request gives to the template, `asked` what it is to write besides the messages. Raises
    InvalidParameter when the template refuses the messages, would leave something out, takes more
    than one rendering may, or there is none; ServerError where nothing could render it.
    """
    own = _own_template(tokenizer, chat)
    tokens = _special_tokens(tokenizer, chat)
    _check_variables(variables)
    conversation = [_turn(message) for message in messages]
    ending = _ending(asked, messages)
    tools = described(asked.tools or ())
    if tools or has_calls(messages) or has_results(messages):
        check_written(messages, tokenizer, chat, with_tools=bool(tools), adapter=adapter)
    turns = with_calls(conversation, messages)
    template = own or _base_template(tokenizer, with_tools=bool(tools))
    with _told(own, adapter, is_to_blame=partial(takes_too_much, template, tokens)):
        text = PROCESSES.render(
            template,
            [[_without_none(turn) for turn in turns]],
            tools=tools or None,
            add_generation_prompt=ending is Ending.NEW_TURN,
            continue_final_message=ending is Ending.LAST_TURN,
            variables={**tokens, **variables},
        )
    try:
        text.encode()  # a template can write half of a character, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise _refused(_whose(own, adapter), str(error)) from error
    return text


def check_written(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    chat: "ChatFormat | None",
    *,
    with_tools: bool,
    adapter: object = None,
) -> TemplateTools:
    """What the template makes of tools; `with_tools` says whether there are.

    Raises InvalidParameter for tools, calls or results that it would leave out, for a template
    that takes more than one rendering may, or if there is none; ServerError where nothing could
    render it.
    """
    own = _own_template(tokenizer, chat)
    template = own or _base_template(tokenizer, with_tools=with_tools)
    with _told(own, adapter, is_to_blame=lambda: True):  # the conversation is the server's
        found = template_tools(template, _special_tokens(tokenizer, chat))
    left_out = {
        "tools": ("tools", with_tools and not found.offers),
        "calls of earlier turns": ("messages", has_calls(messages) and not found.calls),
        "results of calls": ("messages", has_results(messages) and not found.results),
    }
    for what, (field, is_left_out) in left_out.items():
        if is_left_out:
            raise InvalidParameter(
                f"{_whose(own, adapter)} does not write {what}: the model would not see them.",
                field=field,
                fix="Leave them out, or name an adapter whose chat template has them.",
            )
    return found


@contextmanager
def _told(own: str | None, adapter: object, *, is_to_blame: Callable[[], bool]) -> Iterator[None]:
    """Say of a rendering what was wrong with it. An adapter's template that was stopped, and is to
    blame for it, is left alone for a while; the base model's would be everybody's."""
    whose = _whose(own, adapter)
    if own is not None and (seconds := _STOPPED.seconds_left(own)):
        raise InvalidParameter(
            f"{whose} took more time or memory than one rendering may.",
            field="messages",
            fix=f"Mend it; the server tries this one again in {seconds} s.",
        )
    try:
        yield
    except TemplateRefused as error:
        raise _refused(whose, str(error)) from error
    except TemplateStopped as error:
        if own is not None and is_to_blame():
            _STOPPED.add(own)
        raise InvalidParameter(
            f"{whose} was stopped: {error}.",
            field="messages",
            fix="Mend it, or send a shorter conversation.",
        ) from error
    except TemplateProcessFailed as error:
        raise ServerError(
            f"{whose} could not be rendered: {error}.", fix="Send the request again."
        ) from error


def _refused(whose: str, reason: str) -> InvalidParameter:
    return InvalidParameter(f"{whose} refuses these messages: {reason}.", field="messages")


def _base_template(tokenizer: Tokenizer, *, with_tools: bool) -> str:
    try:
        # Of several templates, one may be for tools.
        return tokenizer.get_chat_template(None, [{}] if with_tools else None)
    except ValueError as error:
        raise InvalidParameter(
            f"The base model has no chat template for this: {error}", field="messages"
        ) from error


def _own_template(tokenizer: Tokenizer, chat: "ChatFormat | None") -> str | None:
    """The adapter's template; None is the base model's. Raises InvalidParameter for neither."""
    own = None if chat is None else chat.template
    if own is None and not tokenizer.chat_template:
        raise InvalidParameter(
            "The base model has no chat template, nor has the adapter.",
            field="messages",
            fix="Write the whole prompt yourself and use /v1/completions or /generate.",
        )
    return own


def _special_tokens(tokenizer: Tokenizer, chat: "ChatFormat | None") -> dict[str, Any]:
    """What the template finds under the names of special tokens: the adapter's go first."""
    own = {} if chat is None or chat.template is None else chat.special_tokens
    return {**tokenizer.special_tokens_map, **own}


def _whose(own: str | None, adapter: object) -> str:
    if own is None:
        return "The base model's chat template"
    name = str(adapter)
    return "The adapter's chat template" if adapter is None else f"The chat template of {name!r}"


def _ending(asked: TemplateRequest, messages: Sequence[Message]) -> Ending:
    if not asked.continue_final_message:
        return Ending.NOTHING if asked.add_generation_prompt is False else Ending.NEW_TURN
    if asked.add_generation_prompt:
        raise InvalidParameter(
            "continue_final_message goes on from the last message, and add_generation_prompt "
            "begins a new one.",
            field="add_generation_prompt",
            fix="Leave one of the two out.",
        )
    last = messages[-1]
    if last.role != "assistant" or last.tool_calls:
        raise InvalidParameter(
            "continue_final_message needs a last message that is the assistant's, without "
            "tool_calls.",
            field="continue_final_message",
        )
    return Ending.LAST_TURN


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


def _without_none(turn: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers has it: templates write None as a word."""
    return {name: value for name, value in turn.items() if value is not None}


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
