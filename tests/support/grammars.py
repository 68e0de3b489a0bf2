"""Grammars, sequences that keep to them, and random JSON schemas with what is of them."""

import json
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from threading import stack_size
from typing import Any

from hypothesis import strategies as st
from llguidance import LLMatcher

from dynamic_lora_server.engine.engine import EngineEvent, TokenEvent
from dynamic_lora_server.engine.sampling.grammars import STACK_BYTES, CompiledGrammar, Grammars
from dynamic_lora_server.engine.sampling.guides import Guide
from dynamic_lora_server.engine.sequence import Sequence
from dynamic_lora_server.engine.startup.build import BuiltEngine
from dynamic_lora_server.generation import FinishReason, Grammar, GrammarKind
from dynamic_lora_server.text import TokenizerView
from tests.support.engines import make_sequence
from tests.support.models import EOS_ID, VOCAB_SIZE, tiny_tokenizer

VIEW = TokenizerView(tiny_tokenizer())
GRAMMARS = Grammars(VIEW, {EOS_ID})

_LEAVES: list[dict[str, Any]] = [
    {"type": "null"},
    {"type": "boolean"},
    {"type": "integer", "minimum": -50, "maximum": 50},
    {"type": "integer", "exclusiveMinimum": 3, "multipleOf": 5, "maximum": 100},
    {"type": "number"},
    {"type": "string"},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "string", "pattern": "^[a-c]{1,3}$"},
    {"type": ["string", "null"], "maxLength": 3},
    {"enum": ["a", "bc", 1, None, True]},
    {"const": {"é": [1, "x y"]}},
]


def _parents(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["a", "b", "of it", 'q"', "é"])
    arrays = st.builds(
        lambda items, least, more: {
            "type": "array",
            "items": items,
            "minItems": least,
            "maxItems": least + more,
        },
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    objects = st.builds(
        lambda properties, required, others: {
            "type": "object",
            "properties": properties,
            "required": sorted(required & properties.keys()),
            "additionalProperties": others,
        },
        st.dictionaries(names, inner, max_size=3),
        st.sets(names, max_size=3),
        st.just(False) | inner,
    )
    either = st.builds(lambda parts: {"anyOf": parts}, st.lists(inner, min_size=1, max_size=3))
    return arrays | objects | either


SCHEMAS: st.SearchStrategy[dict[str, Any]] = st.recursive(
    st.sampled_from(_LEAVES), _parents, max_leaves=5
)


def json_of(schema: object, field: str = "response_format") -> Grammar:
    """The grammar of a JSON schema."""
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema), field)


def regex(pattern: str, field: str = "guided_regex") -> Grammar:
    """The grammar of a regular expression."""
    return Grammar(GrammarKind.REGEX, pattern, field)


# Each character tells one of many states of its lexer from another.
MANY_STATES = regex("[ab]*a[ab]{12}")


def ids_of(*texts: str) -> set[int]:
    """The first tokens of texts."""
    return {VIEW.encode(text, add_special_tokens=False)[0] for text in texts}


def follow(one: Guide, text: str) -> str | None:
    """Have a guide take the characters of a text; why it can follow no further, if so."""
    for char in text:
        one.allowed(VOCAB_SIZE)
        if one.failures != (None,):
            return one.failures[0]
        one.take(*ids_of(char))
    return None


def compiled(grammar: Grammar, grammars: Grammars = GRAMMARS) -> CompiledGrammar:
    """A grammar, compiled on a thread that has room for it."""
    usual = stack_size(STACK_BYTES)
    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(grammars.compile, grammar).result()
    finally:
        stack_size(usual)


def matcher_of(grammar: Grammar, grammars: Grammars = GRAMMARS) -> LLMatcher:
    """What llguidance knows of a grammar, at its beginning."""
    return compiled(grammar, grammars).guide(ends=())._matcher


def guide(grammar: Grammar, **tokens: Any) -> Guide:
    """What guides one answer of the tiny tokenizer."""
    return compiled(grammar).guide(**{"ends": {EOS_ID}} | tokens)


def guided(prompt_ids: Seq[int], grammar: Grammar, **params: Any) -> Sequence:
    """A continuation that keeps to a grammar."""
    sequence = make_sequence(prompt_ids, **{"ignore_eos": False, "max_new_tokens": 80} | params)
    sequence.guide = guide(grammar)
    return sequence


def text_of(token_ids: Seq[int]) -> bytes:
    """What tokens read as, without the one that ends an answer."""
    return b"".join(VIEW.bytes_of(one) for one in token_ids if one != EOS_ID)


def ends_of(built: BuiltEngine, sequences: Seq[Sequence]) -> list[FinishReason]:
    """Run the sequences together to their ends; why they ended."""
    for one in sequences:
        built.engine.add(one)
    events: list[EngineEvent] = []
    while built.engine.has_work:
        events += built.engine.step()
    built.engine.scheduler.check_integrity()
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    assert len(tokens) == len(events), events
    reasons = {event.sequence_id: event.reason for event in tokens if event.reason is not None}
    return [reasons[one.id] for one in sequences]
