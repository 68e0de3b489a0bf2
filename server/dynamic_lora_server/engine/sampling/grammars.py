"""Grammars that answers keep to, compiled for a vocabulary (llguidance). Imports no torch."""

import json
from collections import OrderedDict
from collections.abc import Callable, Collection
from functools import cached_property, partial
from hashlib import sha256
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from dynamic_lora_server.engine.sampling.guides import Guide, capped
from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.generation import Grammar, GrammarKind

if TYPE_CHECKING:
    from dynamic_lora_server.text import TokenizerView

V = TypeVar("V")

# Grammars that stay compiled for later requests. Most are compiled in milliseconds, but any may
# have grown to what the states of its lexer may take.
_NUM_KEPT = 16
# Grammars of which is remembered that they cannot be used, or failed in an answer.
_NUM_NOTED = 64
# States of a grammar's lexer, at half a kilobyte each, or three times as much for one that tells
# most bytes apart. A text whose length is limited takes four for each character it may have.
_MAX_STATES = 100_000
# Characters of a grammar. What they come to is llguidance's to limit, but for the stack: it goes
# as deep as definitions refer to one another, so their number is what its thread has room for.
_MAX_LENGTH = 2**17
_MAX_RULES = 2**14  # characters of rules, which may take the square of their number
STACK_BYTES = 2**29
# Without an end a small model may write white space for ever.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"


class CompiledGrammar:
    """A grammar at its beginning, from where any number of answers may go.

    These share its lexer, whose states are worked out once for all of them. Where these become
    too many, or one takes too long, no answer can go on, so `on_failure` is called, and
    `has_failed` says so from then on.
    """

    def __init__(self, matcher: LLMatcher, on_failure: Callable[[], object]) -> None:
        self.has_failed = False
        self._matcher = matcher
        self._on_failure = on_failure

    def guide(self, *, ends: Collection[int], stops: Collection[int] = ()) -> Guide:
        """What guides one answer, with the end tokens and stop tokens that `Guide` tells of."""
        matcher = self._matcher.deep_copy()
        return Guide(matcher, ends=ends, stops=stops, on_failure=self._fail)

    def _fail(self) -> None:
        self._on_failure()
        self.has_failed = True


class Grammars:
    """Compiles grammars for a tokenizer, whose texts end with `end_ids`. Any thread may use it.

    The last ones stay compiled, and why others cannot be is remembered. One that failed
    in an answer is compiled for every request anew, so that they do not share its lexer.
    """

    def __init__(self, view: "TokenizerView", end_ids: Collection[int]) -> None:
        self._view = view
        self._end_ids = end_ids
        self._compiled: _Recent[CompiledGrammar] = _Recent(_NUM_KEPT)
        self._refusals: _Recent[str] = _Recent(_NUM_NOTED)
        self._failed: _Recent[bool] = _Recent(_NUM_NOTED)

    def known(self, grammar: Grammar) -> CompiledGrammar | None:
        """A grammar that is compiled already; None for one that must be.

        Raises InvalidParameter, naming the field, for one that is known to be unusable.
        """
        most = _MAX_RULES if grammar.kind is GrammarKind.RULES else _MAX_LENGTH
        if len(grammar.source) > most:
            raise _unusable(grammar, f"it has more than {most} characters")
        key = _key(grammar)
        if (reason := self._refusals.get(key)) is not None:
            raise _unusable(grammar, reason)
        return self._compiled.get(key)

    def is_shared(self, grammar: Grammar) -> bool:
        """Whether what is compiled may be for several requests."""
        return self._failed.get(_key(grammar)) is None

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """A grammar that may be compiled already; on a thread whose stack has STACK_BYTES.

        The first waits until llguidance has read the vocabulary. Raises InvalidParameter, naming
        the field, for a grammar that cannot be read, that is not supported or too large, and for
        all if llguidance cannot read the vocabulary.
        """
        if (found := self.known(grammar)) is not None:
            return found
        key = _key(grammar)
        try:
            matcher = self._matcher(grammar)
        except ValueError as error:
            reason = capped(str(error))
            self._refusals.put(key, reason)
            raise _unusable(grammar, reason) from error
        compiled = CompiledGrammar(matcher, partial(self._fail, key))
        if self.is_shared(grammar):
            self._compiled.put(key, compiled)
        return compiled

    def _fail(self, key: bytes) -> None:
        self._failed.put(key, True)
        self._compiled.drop(key)

    def _matcher(self, grammar: Grammar) -> LLMatcher:
        """A matcher to be copied. Raises ValueError with the reason."""
        # What else it may take is llguidance's default: megabytes, and fractions of a second.
        limits = LLParserLimits(max_lexer_states=_MAX_STATES, verbose_errors=False)
        try:
            written = _written(grammar.kind, grammar.source)
            matcher = LLMatcher(self._vocabulary(), written, log_level=0, limits=limits)
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise ValueError(f"llguidance broke on it: {error}") from error
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def _vocabulary(self) -> LLTokenizer:
        """As llguidance has it. Raises ValueError."""
        if isinstance(self._read, str):
            raise ValueError(self._read)
        return self._read

    @cached_property
    def _read(self) -> LLTokenizer | str:
        """The vocabulary, or why llguidance cannot read it."""
        known = sorted(end for end in self._end_ids if end < self._view.vocab_size)
        try:
            return LLTokenizer(self._view.backend.to_str(), eos_token=known or None)
        except ValueError as error:
            return f"llguidance does not take this model's tokenizer: {error}"


class _Recent(Generic[V]):
    """The values that were put or asked for last, by key, up to a number of them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: OrderedDict[bytes, V] = OrderedDict()
        self._lock = Lock()

    def get(self, key: bytes) -> V | None:
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key]

    def put(self, key: bytes, value: V) -> None:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            if len(self._values) > self._capacity:
                self._values.popitem(last=False)

    def drop(self, key: bytes) -> None:
        with self._lock:
            self._values.pop(key, None)


def _key(grammar: Grammar) -> bytes:
    """What a grammar is remembered by, whichever field asks for it: its text may be long."""
    return sha256(f"{grammar.kind} {grammar.source}".encode()).digest()


def _is_panic(error: BaseException) -> bool:
    """Whether a library in Rust panicked, which is no Exception and of no class to be imported."""
    return type(error).__name__ == "PanicException"


def _written(kind: GrammarKind, source: str) -> str:
    """A grammar in llguidance's own notation. Raises ValueError."""
    match kind:
        case GrammarKind.JSON_SCHEMA:
            return _json(source)
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(source)
        case GrammarKind.CHOICE:
            texts = (json.dumps(text, ensure_ascii=False) for text in json.loads(source))
            return LLMatcher.grammar_from_lark(f"start: {' | '.join(texts)}")
        case GrammarKind.RULES:
            return grammar_from("grammar", source)
        case GrammarKind.CALLS:
            return LLMatcher.grammar_from_lark(source)


def _json(source: str) -> str:
    """JSON of a schema, behind a space or not: many models go on from a prompt with one."""
    return LLMatcher.grammar_from_lark(f'start: " "? answer\nanswer: {json_rule(source)}')


def json_rule(source: str) -> str:
    """What a rule of llguidance's Lark says for JSON of a schema. Raises ValueError."""
    grammar = LLMatcher.grammar_from_json_schema(
        source, defaults={"whitespace_pattern": _WHITESPACE}
    )
    (schema,) = (one["json_schema"] for one in json.loads(grammar)["grammars"])
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def _unusable(grammar: Grammar, reason: str) -> InvalidParameter:
    return InvalidParameter(
        f"The {grammar.kind} of {grammar.field} cannot be used: {reason}.", field=grammar.field
    )
