"""Grammars of calls, in llguidance's notation: of calls alone, or of calls in any text."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynamic_lora_server.engine.sampling.grammars import json_rule
from dynamic_lora_server.tools.notation import Notation

if TYPE_CHECKING:
    from dynamic_lora_server.text import TokenizerView

# `OTHER` is a text that does not begin as a bare call does.
_TERMINALS = r"""
W: /[ \t\r\n]{1,8}/
TEXT: /(.|\n)+/
OTHER: /[ \t\r\n]*([^{ \t\r\n](.|\n)*)?/
"""


@dataclass(frozen=True, slots=True)
class Markers:
    """The tokens that stand for a notation's opening and closing, where there are such.

    `others` are further tokens that an answer may have and that llguidance counts to no text.
    """

    opening: int | None
    closing: int | None
    others: tuple[int, ...]

    @classmethod
    def of(cls, view: "TokenizerView", notation: Notation) -> "Markers":
        """As a tokenizer has them."""
        opening, closing = (
            next(iter(view.known_ids([marker], ())), None) if marker else None
            for marker in (notation.opening, notation.closing)
        )
        return cls(opening, closing, tuple(sorted(view.word_ids - {opening, closing})))


def calls_grammar(
    schemas: Mapping[str, Mapping[str, Any]],
    notation: Notation,
    markers: Markers,
    *,
    forced: bool,
    several: bool,
) -> str:
    """A grammar of calls of functions whose arguments keep to their schemas, by the name.

    Where calls are not `forced`, any text may stand before and between them; in a notation
    without an opening, instead of them, unless it begins as they do.
    """
    several = several and notation.several
    rules = [_TERMINALS, _start(notation, markers, forced=forced, several=several)]
    if notation.opening and not forced:
        # It may be written piece by piece, also where there is a token for it: a text that ends
        # with it is a lexeme, and lazy, which is why no text can go on behind it.
        rules.append(f"opening[lazy]: /(.|\\n)*{re.escape(notation.opening)}/")
    body = _list(several) if notation.listed else "body"
    closing = f"W? {_marker(notation.closing, markers.closing)}" if notation.closing else ""
    rules.append(f"call: {_opening(notation, markers, forced=forced)} {body} {closing}")
    rules.append(f"body: {' | '.join(f'body_{i}' for i in range(len(schemas)))}")
    for i, (name, schema) in enumerate(schemas.items()):
        rules.append(f"body_{i}: {_object(name, notation.arguments, f'arguments_{i}')}")
        rules.append(f"arguments_{i}: {json_rule(json.dumps(schema, ensure_ascii=False))}")
    return "\n".join(rules)


def _start(notation: Notation, markers: Markers, *, forced: bool, several: bool) -> str:
    several = several and not notation.listed
    if forced:
        return f"start: W? call{' (W? call)*' if several else ''}"
    if not notation.opening:
        return "start: W? call | OTHER"
    words = "TEXT"
    if markers.others:
        words += f" | <[{','.join(map(str, markers.others))}]>"
    return f"start: ({words} | call)*" if several else f"start: ({words})* call?"


def _opening(notation: Notation, markers: Markers, *, forced: bool) -> str:
    if not notation.opening:
        return ""
    marker = _marker(notation.opening, markers.opening)
    if forced:
        return f"{marker} W?"
    return "opening W?" if markers.opening is None else f"(opening | {marker}) W?"


def _list(several: bool) -> str:
    return '"[" W? body (W? "," W? body)* W? "]"' if several else '"[" W? body W? "]"'


def _object(name: str, arguments_key: str, arguments: str) -> str:
    texts = ["{", '"name"', ":", f'"{name}"', ",", f'"{arguments_key}"', ":"]
    return " W? ".join([*map(json.dumps, texts), arguments, '"}"'])


def _marker(text: str, token_id: int | None) -> str:
    return json.dumps(text) if token_id is None else f"<[{token_id}]>"
