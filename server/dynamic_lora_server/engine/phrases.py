"""What tokens followed which, in a text and in all that one adapter has said. Imports no torch.

Prompt lookup (Saxena 2023) guesses a text's next token from what followed the same tokens
earlier in it. Adapters are trained on one task and repeat themselves from one answer to the
next, so that what an adapter has said before tells more: the SuffixDecoding (Oliaro et al.
2024) of one task.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

# Tokens of context by which the next one is looked up, the longest first.
ORDERS = (4, 3, 2, 1)
LONGEST = ORDERS[0]

# Contexts of all adapters together, at about 130 bytes each.
MAX_CONTEXTS = 2**18
# Of one adapter: a quarter, so that a busy one does not make all others forget.
_MAX_OF_ONE = MAX_CONTEXTS // 4
# Each text looks over all of them as it begins, and each has more than its contexts.
MAX_SPEAKERS = 256
# Of a prompt only its end is read: beyond, indexing it would be felt in a step.
_MAX_PROMPT = 1024
# Guesses of one kind after which half of their record is forgotten.
_RECORD = 256


class Guess(NamedTuple):
    """A token that may come next, and how it was found, for the record of such guesses."""

    token_id: int
    kind: int


class Phrases:
    """What followed the last tokens of a text: the latest token for each context.

    Holds at most `capacity` contexts and forgets the older half of them when full. A context
    is known by its hash: two that share one make a wrong guess and nothing worse.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def note(self, contexts: Sequence[int], token_id: int) -> None:
        """Remember what came after these contexts."""
        for context in contexts:
            self._young[context] = token_id
        if 2 * len(self._young) >= self._capacity:
            self._old, self._young = self._young, {}

    def after(self, context: int) -> int | None:
        """What came last after this context, if it is known."""
        token_id = self._young.get(context)
        return self._old.get(context) if token_id is None else token_id


def contexts_of(tokens: Sequence[int]) -> list[int]:
    """The contexts that the ends of `tokens` are, longest first; a short text has fewer."""
    count = len(tokens)
    return [hash(tuple(tokens[count - order :])) for order in ORDERS if order <= count]


class Record:
    """How often guesses of each kind were right, with less weight on what is long ago."""

    def __init__(self) -> None:
        # Before anything is known a guess is right once in three times.
        self._right = [1.0] * _NUM_KINDS
        self._made = [3.0] * _NUM_KINDS

    def share(self, kind: int) -> float:
        """The share of such guesses that were right, between 0 and 1."""
        return self._right[kind] / self._made[kind]

    def score(self, kind: int, *, right: bool) -> None:
        """Record a guess that was made, whether or not anybody acted on it."""
        self._right[kind] += right
        self._made[kind] += 1.0
        if self._made[kind] > _RECORD:
            self._right[kind] /= 2
            self._made[kind] /= 2


class Speaker:
    """All that one adapter (or the base model) has said, and how well that foretells it."""

    def __init__(self) -> None:
        self.phrases = Phrases(_MAX_OF_ONE)
        self.record = Record()


class Speakers:
    """Speakers by the digest of their adapter; the least recently heard is forgotten first."""

    def __init__(self) -> None:
        self._speakers: OrderedDict[str | None, Speaker] = OrderedDict()

    def __len__(self) -> int:
        return len(self._speakers)

    @property
    def num_contexts(self) -> int:
        """Contexts that are remembered of all of them."""
        return sum(len(speaker.phrases) for speaker in self._speakers.values())

    def of(self, digest: str | None) -> Speaker:
        """The speaker, a new one if it was not heard lately; called when a text begins."""
        speaker = self._speakers.pop(digest, None) or Speaker()
        self._speakers[digest] = speaker
        while len(self._speakers) > 1 and self._too_many:
            self._speakers.popitem(last=False)
        return speaker

    @property
    def _too_many(self) -> bool:
        return len(self._speakers) > MAX_SPEAKERS or self.num_contexts > MAX_CONTEXTS


class Text:
    """One text as it grows: what may come next by itself and by its speaker.

    Every next token is guessed and the guess scored, so that the record is kept up where
    nothing is drafted.
    """

    def __init__(self, speaker: Speaker, prompt: Sequence[int]) -> None:
        self._speaker = speaker
        self._own = Phrases(2 * len(ORDERS) * _MAX_PROMPT)
        self._end: list[int] = []  # the last tokens
        self._was_right = False
        self._guess: Guess | None = None
        for token_id in prompt[-_MAX_PROMPT:]:
            self._own.note(contexts_of(self._end), token_id)
            self._append(token_id)
        self._guess = self._next(self._end, was_right=False)

    def hear(self, token_id: int) -> None:
        """The text's next token."""
        guess = self._guess
        self._was_right = guess is not None and guess.token_id == token_id
        if guess is not None:
            self._speaker.record.score(guess.kind, right=self._was_right)
        contexts = contexts_of(self._end)
        self._own.note(contexts, token_id)
        self._speaker.phrases.note(contexts, token_id)
        self._append(token_id)
        self._guess = self._next(self._end, was_right=self._was_right)

    def expected(self, most: int, least: float) -> list[tuple[int, float]]:
        """At most so many tokens that may come next, each with the chance that all up to it do.

        The list ends where that chance falls below `least`.
        """
        found: list[tuple[int, float]] = []
        guess, chance, end = self._guess, 1.0, self._end
        while guess is not None and len(found) < most:
            chance *= self._speaker.record.share(guess.kind)
            if chance < least:
                break
            found.append((guess.token_id, chance))
            end = [*end[-LONGEST + 1 :], guess.token_id]
            guess = self._next(end, was_right=True)
        return found

    def _append(self, token_id: int) -> None:
        self._end = [*self._end[-LONGEST + 1 :], token_id]

    def _next(self, end: Sequence[int], *, was_right: bool) -> Guess | None:
        """What followed the longest context that is known, in this text or else elsewhere."""
        for length, context in zip(ORDERS[LONGEST - len(end) :], contexts_of(end), strict=True):
            for source, phrases in enumerate((self._own, self._speaker.phrases)):
                token_id = phrases.after(context)
                if token_id is not None:
                    return Guess(token_id, _kind(length, source, was_right=was_right))
        return None


_NUM_KINDS = len(ORDERS) * 4


def _kind(length: int, source: int, *, was_right: bool) -> int:
    """One number for a guess's length of context, source, and how the text's last one went."""
    return ((length - 1) * 2 + source) * 2 + was_right
