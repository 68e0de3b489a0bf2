"""Whatever a grammar of calls allows is calls that keep to their schemas."""

import json
import random
from functools import cache
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from dynamic_lora_server.engine.sampling.grammars import Grammars
from dynamic_lora_server.generation import Grammar, GrammarKind
from dynamic_lora_server.text import Detokenizer, TokenizerView
from dynamic_lora_server.tools.calls import CallArguments, FreeReader, GuidedReader, Words
from dynamic_lora_server.tools.grammar import Markers, calls_grammar
from dynamic_lora_server.tools.notation import HERMES, LLAMA3, MISTRAL, NOTATIONS, Notation
from tests.server.tools.test_calls import Found, read
from tests.support.grammars import SCHEMAS, compiled
from tests.support.models import EOS_ID, tiny_tokenizer
from tests.support.tools import WEATHER

NONE: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
# Tokens that end strings, objects and lists; without them a random walk would not come to an end.
ENDINGS = [b'"', b"}", b"]", b",", b":", b">", b"</", b"0", b"\n"]


@cache
def view_of(*, marked: bool, special: bool = False) -> TokenizerView:
    """The tiny tokenizer, with tokens for what notations mark calls by or without."""
    tokenizer = tiny_tokenizer()
    if marked:
        names = [marker for one in NOTATIONS.values() for marker in one.markers]
        tokenizer.add_tokens([AddedToken(name, special=special) for name in names])
        tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return TokenizerView(tokenizer)


@cache
def grammars_of(view: TokenizerView) -> Grammars:
    return Grammars(view, {EOS_ID})


def walk(
    view: TokenizerView, source: str, seed: int, pieces: tuple[str, ...] = (), most: int = 400
) -> list[int] | None:
    """Tokens of a random answer; None where it did not come to an end."""
    grammar = Grammar(GrammarKind.CALLS, source, "tools")
    guide, draw = compiled(grammar, grammars_of(view)).guide(ends={EOS_ID}), random.Random(seed)
    by_text = {view.bytes_of(one): one for one in range(view.vocab_size)}
    endings = [by_text[one] for one in ENDINGS if one in by_text]
    texts = [tiny_ids(piece) for piece in pieces]
    tokens: list[int] = []
    line: list[int] = []
    while len(tokens) < most:
        (mask,) = guide.allowed(view.vocab_size)
        assert guide.failures == (None,), guide.failures
        allowed = [one for one in range(view.vocab_size) if mask[one >> 3] >> (one & 7) & 1]
        if not line and texts and draw.random() < 0.3:
            line = list(draw.choice(texts))
        likely = [one for one in [*endings, EOS_ID] if one in allowed]
        if line and line[0] in allowed:
            token = line.pop(0)
        else:
            line = []
            token = draw.choice(likely if likely and draw.random() < 0.5 else allowed)
        if token == EOS_ID:
            return tokens
        tokens.append(token)
        if guide.take(token):
            return tokens
    return None


def tiny_ids(text: str) -> list[int]:
    """A text in pieces, also where there is one token for all of it."""
    return list(view_of(marked=False).encode(text, add_special_tokens=False))


def text_of(view: TokenizerView, notation: Notation, tokens: list[int]) -> str:
    shown = view.known_ids(notation.markers, ())
    detokenizer = Detokenizer(view, shown=shown)
    return "".join(detokenizer.push(token) for token in tokens) + detokenizer.finish()


def grammar_of(
    view: TokenizerView, notation: Notation, schemas: dict[str, Any], **how: bool
) -> str:
    how = {"forced": True, "several": True} | how
    return calls_grammar(schemas, notation, Markers.of(view, notation), **how)


def check(found: Found, schemas: dict[str, Any]) -> list[tuple[str, str]]:
    for name, arguments in found[1]:
        jsonschema.validate(json.loads(arguments), schemas[name])
    return found[1]


@given(
    schema=SCHEMAS,
    seed=st.integers(0, 2**32),
    notation=st.sampled_from(sorted(NOTATIONS)),
    marked=st.booleans(),
    special=st.booleans(),
    several=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_calls_that_must_come_keep_to_their_schemas(
    schema: dict[str, Any],
    seed: int,
    notation: str,
    marked: bool,
    special: bool,
    several: bool,
) -> None:
    one, view = NOTATIONS[notation], view_of(marked=marked, special=special and marked)
    properties = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    schemas = {"f": {**properties, "additionalProperties": False}, "g.h-1": NONE}
    tokens = walk(view, grammar_of(view, one, schemas, several=several), seed)
    if tokens is None:
        return
    text = text_of(view, one, tokens)
    calls = check(read(GuidedReader(one), *text), schemas)
    assert len(calls) == 1 or (len(calls) > 1 and several and one.several)
    # Who reads without the grammar's word for it finds the same.
    assert read(FreeReader(one, schemas), text) == ("", calls)


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("notation", [HERMES, MISTRAL], ids=lambda one: one.name)
def test_in_any_text_each_opening_begins_calls(
    notation: Notation, several: bool, marked: bool
) -> None:
    schemas = {"f": WEATHER, "g": NONE}
    view = view_of(marked=marked)
    source = grammar_of(view, notation, schemas, forced=False, several=several)
    pieces = ("the hill", notation.opening, notation.opening[:5], notation.opening[5:], "<think>")
    numbers = []
    for seed in range(60):
        tokens = walk(view, source, seed, pieces)
        if tokens is None:
            continue
        text = text_of(view, notation, tokens)
        words, calls = read(FreeReader(notation, schemas), text)
        check((words, calls), schemas)
        assert notation.opening not in words
        numbers.append(len(calls))
    assert min(numbers) == 0
    assert max(numbers) >= (2 if several else 1)
    assert several or max(numbers) == 1 or notation.listed


def test_a_bare_call_or_a_text_that_begins_otherwise() -> None:
    schemas = {"f": NONE}
    view = view_of(marked=False)
    source = grammar_of(view, LLAMA3, schemas, forced=False)
    found = []
    for seed in range(40):
        tokens = walk(view, source, seed, ("the hill", '{"name"', "{"))
        if tokens is not None:
            text = text_of(view, LLAMA3, tokens)
            words, calls = read(FreeReader(LLAMA3, schemas), text)
            assert calls or not words.lstrip().startswith("{")
            found.append(len(calls))
    assert set(found) == {0, 1}


def test_other_tokens_may_stand_in_the_text_before_a_call() -> None:
    """llguidance counts a token such as <think> to no text, though it is none of the special."""
    view = view_of(marked=True)
    source = grammar_of(view, HERMES, {"f": NONE}, forced=False)
    grammar = compiled(Grammar(GrammarKind.CALLS, source, ""), grammars_of(view))
    guide = grammar.guide(ends={EOS_ID})
    for token in view.encode("a<think>b<tool_call>", add_special_tokens=False):
        (mask,) = guide.allowed(view.vocab_size)
        assert mask[token >> 3] >> (token & 7) & 1
        assert not guide.take(token)
    assert not guide.allowed(view.vocab_size)[0][0] >> EOS_ID & 1


def test_references_within_each_schema_stay_its_own() -> None:
    leaf = {"$ref": "#/$defs/leaf"}
    schemas = {
        name: {
            "type": "object",
            "properties": {"x": leaf},
            "required": ["x"],
            "additionalProperties": False,
            "$defs": {"leaf": {"const": name}},
        }
        for name in ("f", "g")
    }
    view = view_of(marked=False)
    found: set[str] = set()
    for seed in range(20):
        tokens = walk(view, grammar_of(view, HERMES, schemas, several=False), seed)
        if tokens is not None:
            parts = GuidedReader(HERMES).push(text_of(view, HERMES, tokens))
            assert not any(isinstance(part, Words) for part in parts)
            found.update(json.loads(p.text)["x"] for p in parts if isinstance(p, CallArguments))
    assert found == {"f", "g"}
