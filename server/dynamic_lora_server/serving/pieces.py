"""Tokens as clients get them: those of answers one by one, those of prompts kept small."""

from array import array
from collections.abc import Iterable, Iterator

from dynamic_lora_server.engine.sampling.sampler import Sampled
from dynamic_lora_server.generation import TokenLogprob, TokenPiece
from dynamic_lora_server.text import TokenizerView


def piece_of(
    sampled: Sampled, view: TokenizerView, *, index: int, text: str, offset: int
) -> TokenPiece:
    """A token of continuation `index` with what it adds to the text, and where it begins in it."""
    return TokenPiece(
        index=index,
        token_id=sampled.token_id,
        text=text,
        token_bytes=view.bytes_of(sampled.token_id),
        offset=offset,
        special=view.is_special(sampled.token_id),
        logprob=sampled.logprob,
        top=tuple(
            TokenLogprob(token_id=token_id, token_bytes=view.bytes_of(token_id), logprob=logprob)
            for token_id, logprob in sampled.top
        ),
    )


class PromptPieces:
    """The tokens of a prompt with their log-probabilities, of which the first has none.

    They are kept as numbers, four bytes each, for a prompt may have many and be given back often;
    each piece is made when it is read.
    """

    def __init__(self, view: TokenizerView, *, index: int, text: str, first_id: int) -> None:
        self._view = view
        self._index = index
        self._text = text
        self._first_id = first_id
        self._ids = array("i")
        self._logprobs = array("f")  # as the model has them
        self._num_top = 0
        self._top_ids = array("i")
        self._top_logprobs = array("f")

    def add(self, tokens: Iterable[Sampled]) -> None:
        """The next tokens, all with as many likely ones beside them."""
        for token in tokens:
            assert token.logprob is not None
            self._ids.append(token.token_id)
            self._logprobs.append(token.logprob)
            self._num_top = len(token.top)
            for token_id, logprob in token.top:
                self._top_ids.append(token_id)
                self._top_logprobs.append(logprob)

    def __iter__(self) -> Iterator[TokenPiece]:
        offset = 0
        for token in self._tokens():
            piece = piece_of(token, self._view, index=self._index, text="", offset=offset)
            yield piece
            offset += _num_in(self._text, piece, offset)

    def _tokens(self) -> Iterator[Sampled]:
        yield Sampled(self._first_id)
        num_top = self._num_top
        for at, (token_id, logprob) in enumerate(zip(self._ids, self._logprobs, strict=True)):
            beside = slice(at * num_top, (at + 1) * num_top)
            top = zip(self._top_ids[beside], self._top_logprobs[beside], strict=True)
            yield Sampled(token_id, logprob, tuple(top))


def _num_in(text: str, piece: TokenPiece, offset: int) -> int:
    """The characters that begin in a token at its place of a text.

    Special tokens that the tokenizer puts before a text are not in it, nor is the space of its
    first word.
    """
    read = piece.token_text
    if piece.special and not text.startswith(read, offset):
        return 0
    absent = offset == 0 and read.startswith(" ") and not text.startswith(" ")
    return sum(byte & 0xC0 != 0x80 for byte in piece.token_bytes) - absent
