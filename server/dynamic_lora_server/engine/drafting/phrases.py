"""What tokens followed which, in a text and in all that one adapter has said. Imports no torch.

Prompt lookup (Saxena 2023) guesses a text's next token from what followed the same tokens
earlier in it. Adapters are trained on one task and repeat themselves from one answer to the
next, so that what an adapter has said before tells more: the SuffixDecoding (Oliaro et al.
2024) of one task.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

# Tokens of context by which the next one is looked up, the longest first.
ORDERS = (4, 3, 2, 1)
LONGEST = ORDERS[0]

# Contexts of all adapters together, at about 130 bytes each.
MAX_CONTEXTS = 2**18
# Of one adapter: a quarter, so that a busy one does not make all others forget.
_MAX_OF_ONE = MAX_CONTEXTS // 4
# Each text looks over all of them as it begins, and each has more than its contexts.
MAX_SPEAKERS = 256
# Of a prompt only its end is looked at.
_MAX_PROMPT = 1024
# Of the places where two tokens have been, the latest: frequent ones have no end of them.
_MAX_LOOKED_AT = 16
# Guesses of one kind after which half of their record is forgotten.
_RECORD = 256


class Guess(NamedTuple):
    """A token that may come next, and how it was found, for the record of such guesses."""

    token_id: int
    kind: int


class Path(Protocol):
    """What a grammar lets come next, from token to token."""

    def permits(self, token_id: int) -> bool:
        """Whether this token may come next."""

    def forced(self) -> int | None:
        """The token that comes next if the grammar leaves one text alone."""

    def take(self, token_id: int) -> None:
        """Go on by a token that may come."""


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

    What is expected is scored when the next tokens are heard, whether or not anybody acted on
    it, so that the record is kept up where nothing is drafted.
    """

    def __init__(self, speaker: Speaker, prompt: Sequence[int]) -> None:
        self._speaker = speaker
        self._tokens = list(prompt[-_MAX_PROMPT:])
        self._places: Places | None = None  # once they are asked for
        self._guesses: list[Guess] = []  # of the next tokens, one behind the other
        self._was_right = False

    def hear(self, token_ids: Sequence[int]) -> None:
        """The text's next tokens."""
        guesses = self._guesses
        for number, token_id in enumerate(token_ids):
            guess = guesses[number] if number < len(guesses) else None
            self._was_right = guess is not None and guess.token_id == token_id
            if guess is not None:
                self._speaker.record.score(guess.kind, right=self._was_right)
                if not self._was_right:  # the others were to come behind it
                    guesses = []
            self._speaker.phrases.note(contexts_of(self._tokens[-LONGEST:]), token_id)
            self._append(token_id)
        self._guesses = []

    def expected(
        self, most: int, least: float, ends: Collection[int] = (), path: Path | None = None
    ) -> list[tuple[int, float]]:
        """At most so many tokens that may come next, each with the chance that all up to it do.

        The list ends where that chance falls below `least`, and before a token of `ends`, with
        which the text ends. With a `path` it keeps to a grammar.
        """
        self._guesses = []
        found: list[tuple[int, float]] = []
        chance, end, was_right = 1.0, self._tokens[-LONGEST:], self._was_right
        while len(found) < most:
            guess = self._next(end, was_right=was_right)
            if path is not None:
                guess = _on_path(guess, path)
            if guess is None:
                break
            self._guesses.append(guess)
            chance *= self._speaker.record.share(guess.kind)
            if chance < least or guess.token_id in ends:
                break
            found.append((guess.token_id, chance))
            if path is not None:
                path.take(guess.token_id)
            end, was_right = [*end[-LONGEST + 1 :], guess.token_id], True
        return found

    def _append(self, token_id: int) -> None:
        self._tokens.append(token_id)
        if self._places is not None:
            self._places.add(self._tokens, len(self._tokens) - 2)

    def _next(self, end: Sequence[int], *, was_right: bool) -> Guess | None:
        """What followed the longest context that is known, in this text or else elsewhere."""
        own_length, own = self._own(end)
        for length, context in zip(ORDERS[LONGEST - len(end) :], contexts_of(end), strict=True):
            if own is not None and own_length == length:
                return Guess(own, _kind(length, 0, was_right=was_right))
            token_id = self._speaker.phrases.after(context)
            if token_id is not None:
                return Guess(token_id, _kind(length, 1, was_right=was_right))
        return None

    def _own(self, end: Sequence[int]) -> tuple[int, int | None]:
        """What followed the longest end of `end` that this text has had before, and its length."""
        if self._places is None:
            self._places = Places()
            for place in range(len(self._tokens) - 1):
                self._places.add(self._tokens, place)
        length, last = self._places.latest(self._tokens, end)
        return length, None if last is None else self._tokens[last + 1]


class Places:
    """Where in a text its tokens are, alone and in pairs, but for the last one."""

    def __init__(self) -> None:
        self._latest: dict[int, int] = {}
        self._pairs: dict[tuple[int, int], list[int]] = {}

    def add(self, tokens: Sequence[int], place: int) -> None:
        """Take note of a place, behind which there is another token by now."""
        if place < 0:
            return
        self._latest[tokens[place]] = place
        if place:
            self._pairs.setdefault((tokens[place - 1], tokens[place]), []).append(place)

    def latest(self, tokens: Sequence[int], end: Sequence[int]) -> tuple[int, int | None]:
        """How long an end of `end` there is in the text, and the last place where it is."""
        pairs = self._pairs.get((end[-2], end[-1]), ()) if len(end) > 1 else ()
        best, found = 0, -1
        for place in reversed(pairs[-_MAX_LOOKED_AT:]):
            length, most = 2, min(len(end), place + 1)
            while length < most and tokens[place - length] == end[-1 - length]:
                length += 1
            if length > best:
                best, found = length, place
            if length == len(end):
                break
        if best:
            return best, found
        alone = self._latest.get(end[-1]) if end else None
        return (0, None) if alone is None else (1, alone)


def _on_path(guess: Guess | None, path: Path) -> Guess | None:
    """The guess if the grammar has it, or else what must come."""
    if guess is not None and path.permits(guess.token_id):
        return guess
    forced = path.forced()
    return None if forced is None else Guess(forced, _FORCED)


# What a grammar forces is a kind of its own: the text is certain, by which tokens is not.
_FORCED = len(ORDERS) * 4
_NUM_KINDS = _FORCED + 1


def _kind(length: int, source: int, *, was_right: bool) -> int:
    """One number for a guess's length of context, source, and how the text's last one went."""
    return ((length - 1) * 2 + source) * 2 + was_right
