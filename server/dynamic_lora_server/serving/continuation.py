"""One continuation on its way to its client: the text of its tokens, and its end."""

from dataclasses import dataclass, field

from dynamic_lora_server.engine.engine import PromptEvent, TokenEvent
from dynamic_lora_server.engine.sequence import Sequence
from dynamic_lora_server.generation import Echo, Finish, FinishReason, ServedMode, TokenPiece
from dynamic_lora_server.serving.pieces import PromptPieces, piece_of
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
    _told: PromptPieces = field(init=False)

    def __post_init__(self) -> None:
        sequence = self.sequence
        self._told = PromptPieces(
            self.view,
            index=self.index,
            text=self.prompt_text or "",
            first_id=sequence.prompt_ids[sequence.num_virtual],
        )

    def hear_prompt(self, event: PromptEvent) -> None:
        """The next tokens of the prompt, of which the first is not one."""
        self._told.add(event.tokens)

    def echo(self) -> Echo | None:
        """The prompt, if it is to be given back, once it has run: before the first piece."""
        text, self.prompt_text = self.prompt_text, None
        if text is None:
            return None
        told = self._told if self.sequence.sampling.prompt_logprobs else ()
        return Echo(index=self.index, text=text, pieces=told)

    def piece(self, event: TokenEvent) -> TokenPiece:
        """The next token as the client gets it."""
        text = self.detokenizer.push(event.sampled.token_id, ends=self._only_ends(event))
        return piece_of(
            event.sampled, self.view, index=self.index, text=text, offset=self.detokenizer.offset
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
