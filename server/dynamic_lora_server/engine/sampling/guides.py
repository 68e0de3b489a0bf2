"""Which tokens a grammar leaves in one answer (llguidance). Imports no torch."""

from collections.abc import Callable, Collection, Sequence

from llguidance import LLMatcher

from dynamic_lora_server.noop import noop

_MAX_MESSAGE = 500  # characters of llguidance's that an error quotes


class Guide:
    """Which tokens may come next in one answer. One thread at a time may use it.

    The answer may end with one of the tokens `ends` where the grammar may end, and nowhere else.
    The tokens `stops` may come there, too. `failures` says why no token is left, if so: of what
    was last asked for, at once and behind each token of the draft. `on_failure` is called
    whenever llguidance can follow the grammar no further.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        *,
        ends: Collection[int] = (),
        stops: Collection[int] = (),
        on_failure: Callable[[], object] = noop,
    ) -> None:
        self._matcher = matcher
        self._ends = tuple(ends)
        self._stops = tuple(stops)
        self._on_failure = on_failure
        self.failures: tuple[str | None, ...] = (None,)

    def allowed(self, vocab: int, draft: Sequence[int] = ()) -> list[bytes]:
        """Whether each of `vocab` tokens may come next, eight a byte, the first one lowest.

        Then the same behind the first token of the draft, which may come, behind the second,
        and so on. There nothing is allowed if the grammar fails. Of that the answer, which may
        go another way, takes no harm, unless it is the lexer that fails, of which they have one.
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
            self._on_failure()
            return bytes(num_bytes), capped(matcher.get_error())
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


def capped(message: str) -> str:
    """The beginning of what llguidance says, which may go on with all of a grammar."""
    for rest in ("\n<backtrace>", "\n<non-verbose/>"):
        message = message.partition(rest)[0]
    message = message.strip().rstrip(".")
    return message if len(message) <= _MAX_MESSAGE else f"{message[: _MAX_MESSAGE - 3]}..."
