"""Grammars that answers keep to, and which tokens they leave (llguidance). Imports no torch."""

import json
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from threading import stack_size
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.generation import Grammar, GrammarKind

if TYPE_CHECKING:
    from dynamic_lora_server.text import TokenizerView

# Grammars that stay compiled for later requests.
_NUM_KEPT = 64
# Characters of a grammar. What they come to is llguidance's to limit, but for the stack: it goes
# as deep as definitions refer to one another, so their number is what its thread has room for.
_MAX_LENGTH = 2**17
_MAX_RULES = 2**14  # characters of rules, which may take the square of their number
_STACK_BYTES = 2**29
# Without an end a small model may write white space for ever.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
_MAX_MESSAGE = 500  # characters of llguidance's that an error quotes


class Guide:
    """Which tokens may come next in one answer. One thread at a time may use it.

    The answer may end with one of the tokens `ends` where the grammar may end, and nowhere else.
    The tokens `stops` may come there, too. `failures` says why no token is left, if so: of what
    was last asked for, at once and behind each token of the draft.
    """

    def __init__(
        self, matcher: LLMatcher, *, ends: Collection[int] = (), stops: Collection[int] = ()
    ) -> None:
        self._matcher = matcher
        self._ends = tuple(ends)
        self._stops = tuple(stops)
        self.failures: tuple[str | None, ...] = (None,)

    def allowed(self, vocab: int, draft: Sequence[int] = ()) -> list[bytes]:
        """Whether each of `vocab` tokens may come next, eight a byte, the first one lowest.

        Then the same behind the first token of the draft, which may come, behind the second,
        and so on. There nothing is allowed if the grammar fails, of which the answer, that may
        go another way, takes no harm.
        """
        read = [self._read(self._matcher, vocab)]
        if draft:
            ahead = self._matcher.deep_copy()
            for token_id in draft:
                ahead.consume_token(token_id)
                read.append(self._read(ahead, vocab))
        self.failures = tuple(failure for _, failure in read)
        return [mask for mask, _ in read]

    def _read(self, matcher: LLMatcher, vocab: int) -> tuple[bytes, str | None]:
        """A mask, and why nothing is in it."""
        num_bytes = -(-vocab // 8)
        mask = bytearray(matcher.compute_bitmask()[:num_bytes]).ljust(num_bytes, b"\0")
        if matcher.is_error():
            return bytes(num_bytes), _capped(matcher.get_error())
        may_end = matcher.is_accepting()
        for token_id in self._ends:
            _put(mask, token_id, may_end)
        for token_id in self._stops if may_end else ():
            _put(mask, token_id, True)
        return bytes(mask), None if any(mask) else "no token can follow"

    def take(self, token_id: int) -> bool:
        """Record the next token, which is no end; whether nothing may come after it."""
        self._matcher.consume_token(token_id)
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def path(self) -> "GuidePath":
        """What may come from here on, to be looked ahead along."""
        return GuidePath(self._matcher.deep_copy())


class GuidePath:
    """What a grammar lets come next, from token to token (`phrases.Path`)."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def permits(self, token_id: int) -> bool:
        """Whether this token may come next; not if the grammar may end here and it is an end."""
        return self._matcher.validate_tokens([token_id]) == 1

    def forced(self) -> int | None:
        """The token that comes next if the grammar leaves one text alone."""
        return next(iter(self._matcher.compute_ff_tokens()), None)

    def take(self, token_id: int) -> None:
        """Go on by a token that may come."""
        self._matcher.consume_token(token_id)


def _put(mask: bytearray, token_id: int, bit: bool) -> None:
    place, one = token_id >> 3, 1 << (token_id & 7)
    if place < len(mask):
        mask[place] = mask[place] | one if bit else mask[place] & ~one


class Grammars:
    """Compiles grammars for a tokenizer, whose texts end with `end_ids`.

    One thread of its own does so, for one after another. The first waits until llguidance has
    read the vocabulary.
    """

    def __init__(self, view: "TokenizerView", end_ids: Collection[int]) -> None:
        self._view = view
        self._end_ids = end_ids
        self._compiled = lru_cache(maxsize=_NUM_KEPT)(self._compile)

    def matchers(self, grammar: Grammar, count: int) -> Future[list[LLMatcher]]:
        """So many at the beginning of a grammar, for a guide each.

        The future raises InvalidParameter, naming the field, for a grammar that cannot be read,
        that is not supported or too large, and for all if llguidance cannot read the vocabulary.
        """
        return self._thread.submit(self._matchers, grammar, count)

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        """One thread with a stack for grammars; it ends with this object."""
        executor = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        usual = stack_size(_STACK_BYTES)
        try:
            executor.submit(int)  # starts it
        finally:
            stack_size(usual)
        return executor

    def _matchers(self, grammar: Grammar, count: int) -> list[LLMatcher]:
        most = _MAX_RULES if grammar.kind is GrammarKind.RULES else _MAX_LENGTH
        if len(grammar.source) > most:
            raise _unusable(grammar, f"it has more than {most} characters")
        try:
            compiled = self._compiled(grammar.kind, grammar.source)
        except ValueError as error:
            raise _unusable(grammar, str(error)) from error
        return [compiled.deep_copy() for _ in range(count)]

    def _compile(self, kind: GrammarKind, source: str) -> LLMatcher:
        """A matcher to be copied. Raises ValueError with the reason."""
        # What it may take is llguidance's default: megabytes, and fractions of a second.
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, _written(kind, source), log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """The vocabulary as llguidance has it. Raises ValueError."""
        known = sorted(end for end in self._end_ids if end < self._view.vocab_size)
        try:
            return LLTokenizer(self._view.backend.to_str(), eos_token=known or None)
        except ValueError as error:
            raise ValueError(f"llguidance does not take this model's tokenizer: {error}") from error


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
        f"The {grammar.kind} of {grammar.field} cannot be used: {_capped(reason)}.",
        field=grammar.field,
    )


def _capped(message: str) -> str:
    """The beginning of what llguidance says, which may go on with all of a grammar."""
    for rest in ("\n<backtrace>", "\n<non-verbose/>"):
        message = message.partition(rest)[0]
    message = message.strip().rstrip(".")
    return message if len(message) <= _MAX_MESSAGE else f"{message[: _MAX_MESSAGE - 3]}..."
