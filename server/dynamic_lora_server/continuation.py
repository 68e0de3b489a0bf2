"""One continuation on its way to its client: the text of its tokens, and its end."""

from dataclasses import dataclass

from dynamic_lora_server.engine.engine import TokenEvent
from dynamic_lora_server.engine.sequence import Sequence
from dynamic_lora_server.generation import (
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
    done: bool = False

    def piece(self, event: TokenEvent) -> TokenPiece:
        """The next token as the client gets it."""
        sampled, view = event.sampled, self.view
        text = self.detokenizer.push(sampled.token_id, ends=self._only_ends(event))
        return TokenPiece(
            index=self.index,
            token_id=sampled.token_id,
            text=text,
            token_bytes=view.bytes_of(sampled.token_id),
            offset=self.detokenizer.offset,
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


def _served_mode(sequence: Sequence) -> ServedMode:
    if sequence.adapter is None:
        return ServedMode.BASE
    if not sequence.num_merged:
        return ServedMode.BYPASS
    return ServedMode.MERGED if sequence.num_merged >= sequence.num_run else ServedMode.BOTH
