"""What a chat template makes of tools and calls, seen by having it write some."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dynamic_lora_adapters.files.template_process import (
    PROCESSES,
    TemplateProcessFailed,
    TemplateRefused,
    TemplateStopped,
)
from dynamic_lora_server.tools.notation import HERMES, LLAMA3, MISTRAL, Notation

_KEPT = 64  # templates whose ways stay known
_FUNCTION, _ARGUMENT, _VALUE, _RESULT = "probe_call", "probe_key", "probe_value", "probe_result"
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": _FUNCTION,
        "description": "Probes.",
        "parameters": {
            "type": "object",
            "properties": {_ARGUMENT: {"type": "string", "description": "Anything."}},
            "required": [_ARGUMENT],
        },
    },
}
_CALL: dict[str, Any] = {
    "id": "probe0000",  # nine letters and digits, as Mistral's templates insist
    "type": "function",
    "function": {"name": _FUNCTION, "arguments": {_ARGUMENT: _VALUE}},
}
_ASKED: dict[str, Any] = {"role": "user", "content": "probe"}
_SAID: dict[str, Any] = {"role": "assistant", "content": _VALUE}
_CALLED: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_ANSWERED: dict[str, Any] = {
    "role": "tool",
    "tool_call_id": _CALL["id"],
    "name": _FUNCTION,
    "content": _RESULT,
}
# How a call begins in each notation.
_BEGINNINGS: Mapping[str, re.Pattern[str]] = {
    HERMES.name: re.compile(r'\s*<tool_call>\s*\[?\s*\{\s*"name"\s*:'),
    MISTRAL.name: re.compile(r'\s*\[TOOL_CALLS\]\s*\[\s*\{\s*"name"\s*:'),
    LLAMA3.name: re.compile(r'\s*\{\s*"name"\s*:\s*"probe_call"\s*,\s*"parameters"\s*:'),
}
_KNOWN = (HERMES, MISTRAL, LLAMA3)


@dataclass(frozen=True, slots=True)
class TemplateTools:
    """Whether a template writes the tools on offer, calls and their results.

    `notation` is how it has the model write calls, where that can be told.
    """

    offers: bool
    calls: bool
    results: bool
    notation: Notation | None


def template_tools(template: str, special_tokens: Mapping[str, Any]) -> TemplateTools:
    """What a template does; `special_tokens` are what it finds under their names.

    Raises TemplateStopped for one that takes more than one rendering may.
    """
    return _tried(template, tuple(sorted((k, str(v)) for k, v in special_tokens.items())))


def takes_too_much(template: str, special_tokens: Mapping[str, Any]) -> bool:
    """Whether a template takes more than one rendering may even of one short message."""
    try:
        PROCESSES.render(template, [[_ASKED]], add_generation_prompt=True, variables=special_tokens)
    except TemplateStopped:
        return True
    except (TemplateRefused, TemplateProcessFailed):  # which is something else
        return False
    return False


@lru_cache(maxsize=_KEPT)
def _tried(template: str, special_tokens: tuple[tuple[str, str], ...]) -> TemplateTools:
    tokens = dict(special_tokens)
    offer = _written(template, [_ASKED], tokens)
    history = _written(template, [_ASKED, _CALLED, _ANSWERED], tokens)
    said = _written(template, [_ASKED, _SAID], tokens)
    calls = _VALUE in history
    return TemplateTools(
        offers=_FUNCTION in offer,
        calls=calls,
        results=_RESULT in history,
        notation=_notation(_turn(history, said) if calls else None, offer),
    )


def _written(
    template: str, messages: Sequence[dict[str, Any]], special_tokens: Mapping[str, Any]
) -> str:
    """The conversation as the template has it; nothing if it refuses it."""
    try:
        return PROCESSES.render(template, [messages], tools=[_TOOL], variables=special_tokens)
    except TemplateRefused:
        return ""


def _turn(history: str, said: str) -> str | None:
    """The model's turn in the history and what follows: it begins where words would."""
    before, found, _ = said.rpartition(_VALUE)
    before = before.rstrip()
    return history[len(before) :] if found and history.startswith(before) else None


def _notation(turn: str | None, offer: str) -> Notation | None:
    """By the call that the template wrote, or else by what it tells the model to write."""
    if turn is not None:
        return next((one for one in _KNOWN if _BEGINNINGS[one.name].match(turn)), None)
    marked = (one for one in _KNOWN if one.opening)
    return next((one for one in marked if _BEGINNINGS[one.name].search(offer)), None)
