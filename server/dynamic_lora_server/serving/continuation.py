"""One continuation on its way to its client: the text of its tokens, and its end."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from dynamic_lora_server.engine.engine import PromptEvent, TokenEvent
from dynamic_lora_server.engine.sampling.sampler import Sampled
from dynamic_lora_server.engine.sequence import Sequence
from dynamic_lora_server.generation import (
    Echo,
    Finish,
    FinishReason,
    ServedMode,
    TokenLogprob,
    TokenPiece,
)
from dynamic_lora_server.text import Detokenizer, TokenizerView


@dataclass(slots=True)
class Continuation:
    """One of the n answers to a request. Nothing comes after it is `done`."""

    index: int
    sequence: Sequence
    view: TokenizerView
    detokenizer: Detokenizer
    prompt_text: str | None = None  # where it is to be given back
    done: bool = False
    _told: list[Sampled] = field(default_factory=list)

    def hear_prompt(self, event: PromptEvent) -> None:
        """The next tokens of the prompt, of which the first is not one."""
        self._told += event.tokens

    def echo(self) -> Echo | None:
        """The prompt, if it is to be given back, once it has run: before the first piece."""
        text, self.prompt_text = self.prompt_text, None
        if text is None:
            return None
        return Echo(index=self.index, text=text, pieces=tuple(self._prompt_pieces(text)))

    def _prompt_pieces(self, text: str) -> Iterator[TokenPiece]:
        if not self.sequence.sampling.prompt_logprobs:
            return
        offset, first = 0, Sampled(self.sequence.prompt_ids[self.sequence.num_virtual])
        for sampled in (first, *self._told):
            piece = self._written(sampled, text="", offset=offset)
            yield piece
            offset += _num_in(text, piece, offset)

    def piece(self, event: TokenEvent) -> TokenPiece:
        """The next token as the client gets it."""
        text = self.detokenizer.push(event.sampled.token_id, ends=self._only_ends(event))
        return self._written(event.sampled, text=text, offset=self.detokenizer.offset)

    def _written(self, sampled: Sampled, *, text: str, offset: int) -> TokenPiece:
        view = self.view
        return TokenPiece(
            index=self.index,
            token_id=sampled.token_id,
            text=text,
            token_bytes=view.bytes_of(sampled.token_id),
            offset=offset,
            special=view.is_special(sampled.token_id),
            logprob=sampled.logprob,
            top=tuple(
                TokenLogprob(
                    token_id=token_id, token_bytes=view.bytes_of(token_id), logprob=logprob
                )
                for token_id, logprob in sampled.top
            ),
        )

    def _only_ends(self, event: TokenEvent) -> bool:
        """Whether the token ends the answer without being a part of its text."""
        if event.reason is FinishReason.STOP:
            return not self.detokenizer.include_stop
        # A grammar may end an answer with a token of its own, which is a part of the text.
        return event.reason is FinishReason.EOS and event.sampled.token_id in self.sequence.stop_ids

    def finish(self, event: TokenEvent) -> Finish | None:
        """The end, if it has come with this token, whose `piece` has been taken."""
        reason = event.reason
        if self.detokenizer.stopped and reason is not FinishReason.EOS:
            reason = FinishReason.STOP
        if reason is None:
            return None
        self.done = True
        tail = self.detokenizer.finish()
        sequence = self.sequence
        return Finish(
            index=self.index,
            reason=reason,
            text=self.detokenizer.text,
            tail=tail,
            num_prompt_tokens=sequence.num_prompt,
            num_cached_tokens=sequence.num_cached_prompt,
            num_output_tokens=self.detokenizer.num_tokens,
            seed=None if sequence.sampling.greedy else sequence.seed,
            mode=_served_mode(sequence),
        )


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


def _served_mode(sequence: Sequence) -> ServedMode:
    if sequence.adapter is None:
        return ServedMode.BASE
    if not sequence.num_merged:
        return ServedMode.BYPASS
    return ServedMode.MERGED if sequence.num_merged >= sequence.num_run else ServedMode.BOTH
