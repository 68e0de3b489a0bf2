"""Sequences beside the prefix cache: what they take from it and leave in it. Imports no torch."""

from collections.abc import Iterable

from dynamic_lora_server.engine.kv.prefix_cache import (
    CellCopy,
    Found,
    PrefixCache,
    block_keys,
)
from dynamic_lora_server.engine.kv.space import Allocation, KVSpace
from dynamic_lora_server.engine.sequence import Sequence

# A prompt waits for tokens that another is computing if they are at least so many, and at
# least half of its own: fewer are computed in less than a step.
_MIN_SHARED = 64


class PrefixReuse:
    """Looks prompts up when their first piece is due, keeps blocks as pieces and answers are done.

    So of a burst of prompts with one beginning, the first computes it and the
    others find it: they wait for as long as its pieces, one in each step, are of that
    beginning. At least the last token of a prompt is always computed, for the model's
    answer to it is the first token of the output.
    """

    def __init__(self, cache: PrefixCache) -> None:
        self.cache = cache
        self._copies: list[CellCopy] = []
        self._under_way: set[bytes] = set()
        # Adapters whose blocks were spoilt, in this step and in the one before.
        self._spoilt: set[str | None] = set()
        self._just_spoilt: set[str | None] = set()

    def add(self, sequence: Sequence) -> None:
        """Compute the keys of the blocks of a sequence's tokens, as many as are read by now."""
        # Where the prompt's log-probabilities are wanted, all of it must run.
        if self.cache.enabled and not sequence.sampling.prompt_logprobs:
            sequence.block_keys = block_keys(
                sequence.tokens(0, sequence.num_tokens),
                block_size=self.cache.block_size,
                owner=sequence.adapter_digest,
                # Virtual tokens are the adapter's, wherever it begins to act.
                active_from=0 if sequence.num_virtual else sequence.active_from,
                known=sequence.block_keys,
            )

    def reserve(self, sequence: Sequence, space: KVSpace) -> Allocation | None:
        """Cells for all that a sequence may become; None if the space has too few.

        Full pages that are known to begin it are held from now on, and no others taken for them.
        """
        if self.cache.shared:
            return self.cache.reserve(sequence.max_tokens, self._useful_keys(sequence))
        if not space.can_allocate(sequence.max_tokens):
            return None
        return space.allocate(sequence.max_tokens)

    def begin_step(self) -> None:
        """Nothing is being computed in this step yet."""
        self._under_way.clear()
        self._spoilt, self._just_spoilt = set(), self._spoilt

    def begin(self, sequence: Sequence) -> bool:
        """Look a sequence up before it gets a piece; False if it should wait one step."""
        if not has_begun(sequence):
            keys = self._useful_keys(sequence)
            num_known = self.cache.num_known(keys)
            if self._soon_known(keys[num_known:], sequence, num_known):
                return False
            self._reuse(sequence, self.cache.find(keys))
        if sequence.num_lasting is None and sequence.adapter_digest not in self._just_spoilt:
            first = sequence.num_computed // self.cache.block_size
            self._under_way.update(sequence.block_keys[first:])
        return True

    def spoil(self, sequence: Sequence) -> None:
        """Keep nothing that is computed of a sequence from now on, nor have others wait for it."""
        self._spoilt.add(sequence.adapter_digest)
        if sequence.num_lasting is None:
            sequence.num_lasting = sequence.num_computed

    def discard(self, sequence: Sequence) -> None:
        """Drop what a sequence found and left, and what others of its adapter left before it."""
        sequence.num_lasting = 0
        self.cache.drop(sequence.block_keys, sequence.adapter_digest)

    def num_left(self, sequence: Sequence) -> int:
        """Tokens of a prompt that are not computed, nor found when it begins, as far as is seen."""
        if has_begun(sequence):
            return sequence.num_pending
        num_known = self.cache.num_known(self._useful_keys(sequence)) * self.cache.block_size
        return sequence.num_pending - max(num_known - sequence.num_given, 0)

    def leave(self, sequence: Sequence) -> None:
        """Keep the blocks of a sequence that ends, its answer's too: a next turn begins with them.

        It must hold its cells still. What an adapter gives is written with the first piece, so that
        one which has not begun leaves nothing.
        """
        if not has_begun(sequence):
            return
        self.add(sequence)
        self.keep(sequence)

    def keep(self, sequence: Sequence) -> None:
        """Keep the blocks with a key that are complete by now."""
        num_tokens = sequence.num_computed
        if sequence.num_lasting is not None:
            num_tokens = sequence.num_lasting
        done = min(num_tokens // self.cache.block_size, len(sequence.block_keys))
        new = range(sequence.num_kept, done)
        if new:
            assert sequence.allocation is not None
            self._copies += self.cache.keep(
                sequence.block_keys, new, sequence.allocation, sequence.adapter_digest
            )
            sequence.num_kept = done

    def add_copies(self, copies: Iterable[CellCopy]) -> None:
        """Have more copied, after what was found or kept by now."""
        self._copies += copies

    def take_copies(self) -> list[CellCopy]:
        """What is to be copied, in this order, before the next step writes; once each."""
        copies, self._copies = self._copies, []
        return copies

    def forget(self) -> None:
        """Drop all blocks and outstanding copies."""
        self.cache.clear()
        self._copies.clear()

    def _useful_keys(self, sequence: Sequence) -> tuple[bytes, ...]:
        """Of the blocks that need not be computed if they are known."""
        num_blocks = (len(sequence.prompt_ids) - 1) // self.cache.block_size
        return sequence.block_keys[:num_blocks]

    def _soon_known(self, keys: tuple[bytes, ...], sequence: Sequence, num_known: int) -> bool:
        """Whether enough of the unknown blocks are being computed, in this step or the next."""
        num_blocks = next((i for i, k in enumerate(keys) if k not in self._under_way), len(keys))
        num_shared = num_blocks * self.cache.block_size
        num_left = sequence.num_pending - num_known * self.cache.block_size
        return num_shared >= max(_MIN_SHARED, num_left / 2)

    def _reuse(self, sequence: Sequence, found: list[Found]) -> None:
        num_tokens = sum(one.num_blocks for one in found) * self.cache.block_size
        if num_tokens > sequence.num_given:
            assert sequence.allocation is not None
            sequence.allocation, copies = self.cache.reuse(found, sequence.allocation)
            self._copies += copies
            sequence.num_computed = sequence.num_reused = num_tokens
            sequence.num_kept = num_tokens // self.cache.block_size
        if sequence.block_keys:
            self.cache.count(
                num_looked_up=sequence.num_prompt, num_reused=sequence.num_cached_prompt
            )


def has_begun(sequence: Sequence) -> bool:
    return sequence.num_computed > sequence.num_given
