"""From token ids to visible text, as they come."""

import codecs
from collections.abc import Collection, Iterable, Iterator, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerBase

from dynamic_lora_server.errors import UnsupportedModel
from dynamic_lora_server.token_bytes import TokenBytes


class TokenizerView:
    """What generation needs of a tokenizer.

    Raises UnsupportedModel for a slow one, and for one whose tokens have no text of their own.
    `num_embeddings` are the ids that the model knows, where the tokenizer may know more.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, num_embeddings: int | None = None
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UnsupportedModel(
                f"{type(tokenizer).__name__} has no fast (tokenizers) version; text cannot be "
                "decoded piece by piece."
            )
        # A file may say that texts are cut off or filled up, as they were for training.
        backend.no_truncation()
        backend.no_padding()
        self.backend: Tokenizer = backend
        self._tokenizer = tokenizer
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added = frozenset(added)
        self._bytes = TokenBytes(backend)
        self._longest = _longest_token(backend)
        known = len(tokenizer)
        self._vocab_size = known if num_embeddings is None else min(known, num_embeddings)

    @property
    def vocab_size(self) -> int:
        """Number of token ids that may be sent, added tokens included."""
        return self._vocab_size

    @property
    def word_ids(self) -> frozenset[int]:
        """Ids of tokens that were added to the vocabulary and are shown as text."""
        words = self._added - self.special_ids
        return frozenset(one for one in words if one < self._vocab_size)

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of a text."""
        # As a batch of one: `encode` alone keeps the GIL.
        (found,) = self.backend.encode_batch([text], add_special_tokens=add_special_tokens)
        return tuple(found.ids)

    def places(self, text: str, *, add_special_tokens: bool) -> Iterator[tuple[int, int, int]]:
        """Token ids of a text, each with its first character and the one behind its last.

        A token that is not of the text has 0 and 0.
        """
        (found,) = self.backend.encode_batch([text], add_special_tokens=add_special_tokens)
        for position, token_id in enumerate(found.ids):
            # One by one: a list of all offsets keeps the GIL for as long as it takes to make.
            start, stop = found.token_to_chars(position) or (0, 0)
            yield token_id, start, stop

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens by their names."""
        (text,) = self.backend.decode_batch([token_ids], skip_special_tokens=False)
        return text

    def known_ids(self, tokens: Iterable[str], ids: Iterable[int]) -> frozenset[int]:
        """Of tokens, by their text or their id, the ids of those that there are."""
        found = {self.backend.token_to_id(token) for token in tokens} | set(ids)
        return frozenset(i for i in found if i is not None and i < self._vocab_size)

    def least_tokens(self, text: str) -> int:
        """A lower bound on the tokens of `text`, without encoding it; 0 where none is known."""
        return 0 if self._longest is None else -(-len(text) // self._longest)

    def bytes_of(self, token_id: int) -> bytes:
        """What a token behind others reads as, a special one included; see TokenBytes."""
        return self._bytes.of(token_id)

    def is_special(self, token_id: int) -> bool:
        """Whether the token is left out of visible text."""
        return token_id in self.special_ids


def _longest_token(backend: Tokenizer) -> int | None:
    """The most characters that one token stands for; None where that has no bound.

    Tokens of bytes stand for what they are written with, one character for each byte. Elsewhere
    a token for what is not known may be a whole word, and a normalizer may drop characters.
    """
    if backend.normalizer is not None or not isinstance(backend.decoder, ByteLevel):
        return None
    return max(map(len, backend.get_vocab(with_added_tokens=True)), default=None)


class _StopString:
    """A stop string, looked for in a text that grows.

    `begin` is where it begins, or the first place where it may do so once the text goes on. Places
    before it are ruled out and never looked at again: however long text and string are, a token
    more takes no longer.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.begin = 0

    def is_in(self, text: str) -> bool:
        """Whether all of the text so far holds it."""
        while self.begin < len(text):
            if text.startswith(self.stop, self.begin):
                return True
            if self.stop.startswith(text[self.begin :]):
                return False
            next_one = text.find(self.stop[0], self.begin + 1)
            self.begin = len(text) if next_one < 0 else next_one
        return False


class Detokenizer:
    """The visible text of one continuation, stop strings cut off.

    It is text that goes on: a space at its beginning belongs to it, as the prompt stands before.
    Bytes that are no characters are U+FFFD. A special token is no part of it, unless it is one of
    those `shown`, nor is the end token with which the answer ends, but one whose name is a stop
    string ends it.

    `push` returns the text that a token makes certain: a character that is
    still incomplete waits for its other bytes, and text that may turn out to
    be the beginning of a stop string waits until it does or does not.
    """

    def __init__(
        self,
        view: TokenizerView,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        shown: Collection[int] = (),
    ) -> None:
        self._view = view
        self._shown = shown
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = [_StopString(one) for one in stop]
        self.include_stop = include_stop
        self._decoded = ""
        self._num_shown = 0
        self.offset = 0  # where the last token's own text begins in all text
        self.num_tokens = 0  # taken, the one that completed a stop string included
        self.stopped = False

    @property
    def text(self) -> str:
        """All text decoded so far, held-back text included, up to the stop string."""
        return self._decoded

    def push(self, token_id: int, *, ends: bool = False) -> str:
        """Take one token; returns the new visible text, often empty. Sets `stopped`.

        `ends` says that it is an end token, and the answer over with it.
        """
        assert not self.stopped, "no token may follow the stop string"
        self.num_tokens += 1
        data = self._visible(token_id, ends=ends)
        if _begins_character(data):
            # What is incomplete before it remains so.
            self._decoded += self._decoder.decode(b"", final=True)
        self.offset = len(self._decoded)
        self._decoded += self._decoder.decode(data)
        self._cut_at_stop()
        return self._show(len(self._decoded) if self.stopped else self._certain())

    def finish(self) -> str:
        """The text that was held back until the end, incomplete characters as U+FFFD."""
        if not self.stopped:
            self._decoded += self._decoder.decode(b"", final=True)
        return self._show(len(self._decoded))

    def _visible(self, token_id: int, *, ends: bool) -> bytes:
        """What a token adds to the text; that of one that is not shown only to be found there."""
        data = self._view.bytes_of(token_id)
        if not ends and (token_id in self._shown or not self._view.is_special(token_id)):
            return data
        name = data.decode(errors="replace")
        return data if any(one.stop == name for one in self._stops) else b""

    def _show(self, end: int) -> str:
        start, self._num_shown = self._num_shown, max(end, self._num_shown)
        return self._decoded[start : self._num_shown]

    def _cut_at_stop(self) -> None:
        found = [one for one in self._stops if one.is_in(self._decoded)]
        if found:
            first = min(found, key=lambda one: one.begin)
            end = first.begin + (len(first.stop) if self.include_stop else 0)
            self._decoded = self._decoded[:end]
            self.stopped = True

    def _certain(self) -> int:
        """Length of the text before whatever may be the beginning of a stop string."""
        return min((one.begin for one in self._stops), default=len(self._decoded))


def _begins_character(data: bytes) -> bool:
    """Whether UTF-8 can begin with this; the later bytes of a character are 0x80 to 0xBF."""
    return bool(data) and data[0] & 0xC0 != 0x80
