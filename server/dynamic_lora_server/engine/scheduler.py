"""Who runs in the next step. Imports no torch."""

from collections import Counter, deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

from dynamic_lora_server.engine.drafting.drafts import Draft, Drafter, DraftStats
from dynamic_lora_server.engine.kv.prefix_cache import CellCopy, PrefixCache, PrefixStats
from dynamic_lora_server.engine.kv.prefix_reuse import PrefixReuse, has_begun
from dynamic_lora_server.engine.kv.space import Allocation, KVSpace
from dynamic_lora_server.engine.sequence import Phase, Sequence
from dynamic_lora_server.generation import FinishReason

# Rows of prompts with logits in one step: each has as many numbers as there are tokens.
_MAX_SCORED = 128


@dataclass(slots=True)
class Piece:
    """The next `num_pending` tokens of a sequence, and behind its last one those of a `draft`.

    Only a piece that `samples` has a draft: the model's answer to its last pending token is the
    next token. It takes `num_tokens` rows in its step. Of `num_sampled` it is asked what comes
    next: of the last pending token's, and of those of the draft. Before these are the rows that
    precede `told_ids`, the tokens of the prompt whose log-probabilities are wanted. `num_scored`
    are both.
    """

    sequence: Sequence
    num_pending: int
    draft: Draft = ()
    # Reckoned once: a step asks for them often, and, once it has begun, less of the sequence pends.
    samples: bool = field(init=False)
    num_tokens: int = field(init=False)
    num_sampled: int = field(init=False)
    told_ids: tuple[int, ...] = field(init=False, default=())
    num_scored: int = field(init=False)

    def __post_init__(self) -> None:
        sequence, num_drafted = self.sequence, len(self.draft)
        self.samples = self.num_pending == sequence.num_pending
        self.num_tokens = self.num_pending + num_drafted
        self.num_sampled = 1 + num_drafted if self.samples else 0
        if sequence.sampling.prompt_logprobs:
            first = max(sequence.num_computed, sequence.num_virtual) + 1
            behind = sequence.num_computed + self.num_pending + 1
            self.told_ids = sequence.prompt_ids[first:behind]
        self.num_scored = len(self.told_ids) + self.num_sampled


class Scheduler:
    """Continuous batching (Orca, Yu et al. 2022) with chunked prefill (Sarathi, 2023).

    Every step runs one token of each decoding sequence, and beside these up to
    `prefill_chunk` tokens of prompts, however many decode. Half of them are
    for the prompt that came first, the rest for those that have the fewest tokens
    to go, in order of arrival among equals. So a long prompt holds up no short
    one, nobody waits for ever, and of a burst of like prompts one is done after
    the other. A sequence is admitted when its whole KV need is free, but for pages that it
    shares, and those that run move for it if they must; it then runs to its end, so nobody is
    preempted and the head of the queue is never overtaken.
    With `prefixes`, the beginning of a prompt that is in the KV cache already, as that of
    another prompt and its answer, is not computed again. A `drafter` adds guessed tokens to
    decoding sequences; it needs each step's tokens to be settled before the next is scheduled.

    A step's pieces `begin` when it is started and are `settle`d when its tokens are
    known. The next step may be scheduled in between: sequences are then taken to go on,
    but for those that end with their longest length. Those keep their place until they
    are settled.
    """

    def __init__(
        self,
        space: KVSpace,
        *,
        max_running: int,
        prefill_chunk: int,
        prefixes: PrefixCache | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self._space = space
        self._prefixes = PrefixReuse(prefixes or PrefixCache.off())
        self.drafter = drafter
        self._max_running = max_running
        self._prefill_chunk = prefill_chunk
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        self._num_by_adapter: Counter[str | None] = Counter()
        self._num_prompts = 0  # with a piece in the step that was scheduled last
        self.moved: list[Sequence] = []  # their cells are copied in that step

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_by_adapter(self) -> Mapping[str | None, int]:
        """Sequences, running and waiting, by the digest of their adapter."""
        return self._num_by_adapter

    @property
    def has_work(self) -> bool:
        """Whether `schedule` would return anything."""
        return bool(self._waiting or self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Its KV need must fit into an empty cache."""
        assert sequence.phase is Phase.WAITING
        self._prefixes.add(sequence)
        self._waiting.append(sequence)
        self._num_by_adapter[sequence.adapter_digest] += 1

    def schedule(self) -> list[Piece]:
        """The pieces of the next step, each with at least one token.

        Before they run, what `take_copies` returns must have been copied.
        """
        self.moved.clear()
        self._admit()
        decoding = [s for s in self._running.values() if _may_go_on(s)]
        pieces = self._prompt_pieces(self._prefill_chunk)
        self._num_prompts = len(pieces)
        drafts: Mapping[int, Draft] = {}
        # Beside a prompt, for which the weights are read in any case, every row is its work, and
        # one that comes perhaps is worth less than one that comes.
        if self.drafter is not None and decoding and not pieces:
            # No more rows than a step may have anyway.
            room = self._max_running + self._prefill_chunk - len(decoding)
            drafts = self.drafter.draft(decoding, room)
        return [*(Piece(s, 1, drafts.get(s.id, ())) for s in decoding), *pieces]

    def _prompt_pieces(self, budget: int) -> list[Piece]:
        """Pieces of prompts with up to `budget` tokens together, in order of arrival."""
        prompts = [s for s in self._running.values() if s.phase is Phase.PREFILL]
        self._prefixes.begin_step()
        taken: dict[int, int] = {}
        scored = _MAX_SCORED
        for sequence, most in self._turns(prompts, budget):
            if not budget:
                break
            if sequence.sampling.prompt_logprobs and not scored:
                continue
            if sequence.id not in taken and not self._prefixes.begin(sequence):
                continue
            before = taken.get(sequence.id, 0)
            num_tokens = min(budget, most, sequence.num_pending - before)
            if sequence.sampling.prompt_logprobs:
                num_tokens = min(num_tokens, scored)
                scored -= num_tokens
            taken[sequence.id] = before + num_tokens
            budget -= num_tokens
        return [Piece(s, taken[s.id]) for s in prompts if s.id in taken]

    def _turns(self, prompts: Seq[Sequence], budget: int) -> list[tuple[Sequence, int]]:
        """Who takes tokens of the budget, one after the other, and how many at most."""
        if len(prompts) < 2:
            return [(sequence, budget) for sequence in prompts]
        shortest_first = sorted(prompts, key=self._prefixes.num_left)
        return [(prompts[0], -(-budget // 2)), *((s, budget) for s in shortest_first)]

    def take_copies(self) -> list[CellCopy]:
        """What is to be copied in the KV cache before anything else is written; once each."""
        return self._prefixes.take_copies()

    def forget_prefixes(self) -> None:
        """Empty the prefix cache: after a broken step nobody knows what was copied."""
        self._prefixes.forget()

    @property
    def num_used_cells(self) -> int:
        """Cells with keys and values of sequences that run; those that several share count once."""
        filled: dict[int, int] = {}
        for sequence in list(self._running.values()):  # at once: metrics ask from another thread
            if (allocation := sequence.allocation) is None:
                continue
            for start, number in allocation.filled(sequence.num_computed).items():
                filled[start] = max(number, filled.get(start, 0))
        return sum(filled.values())

    @property
    def num_reserved_cells(self) -> int:
        """Cells that sequences hold, for what they may yet become, too."""
        held = self._space.num_cells - self._space.num_free
        return held - self._prefixes.cache.num_idle_cells

    def prefix_stats(self) -> PrefixStats:
        """Counts of the prefix cache."""
        return self._prefixes.cache.stats()

    def draft_stats(self) -> DraftStats:
        """Counts of drafted tokens."""
        return DraftStats(0, 0) if self.drafter is None else self.drafter.stats()

    def observe(self, pieces: Seq[Piece], seconds: float) -> None:
        """Record how long the step of the pieces took that were scheduled last."""
        if self.drafter is not None and pieces and not self._num_prompts:
            self.drafter.observe(sum(piece.num_tokens for piece in pieces), seconds)

    def begin(self, piece: Piece, *, lasting: bool = True) -> None:
        """Record that a piece is on its way: later steps find its KV entries.

        Unless they are `lasting`, neither they nor those behind them are kept for other sequences.
        """
        sequence, samples = piece.sequence, piece.samples
        if not lasting:
            self._prefixes.spoil(sequence)
        sequence.num_computed += piece.num_tokens
        if sequence.phase is Phase.PREFILL:
            self._prefixes.keep(sequence)
        if samples:
            sequence.phase = Phase.DECODE
            sequence.num_unread += 1

    def settle(self, piece: Piece, token_ids: Seq[int] = ()) -> tuple[int, FinishReason | None]:
        """Record that a piece of a sequence that has not ended has run; and its tokens, if any.

        These are what the model chose after the last pending token and, one by one, after
        those of the draft that it chose, too. Returns how many of them the sequence takes;
        with the last one it ends if there is a reason.
        """
        sequence = piece.sequence
        num_kept = max(len(token_ids) - 1, 0)  # of the draft
        # What lies in the cache of the others is written over by the next step.
        sequence.num_computed -= len(piece.draft) - num_kept
        sequence.num_run += piece.num_pending + num_kept
        if not token_ids:
            return 0, None
        sequence.num_unread -= 1
        num_taken, reason = _take(sequence, token_ids)
        if self.drafter is not None:
            self.drafter.hear(sequence, token_ids[:num_taken], len(piece.draft))
        if reason is not None:
            self.end(sequence)
        return num_taken, reason

    def end(self, sequence: Sequence) -> bool:
        """Take a sequence out, wherever it is; False if it had ended already."""
        if sequence.phase is Phase.ENDED:
            return False
        self._forget(sequence.adapter_digest)
        if sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
        else:
            del self._running[sequence.id]
            self._prefixes.leave(sequence)
            self._space.free(_allocation(sequence))
            sequence.allocation = None
        sequence.phase = Phase.ENDED
        if self.drafter is not None:
            self.drafter.forget(sequence)
        return True

    def discard(self, sequence: Sequence) -> bool:
        """As `end`, but nobody is to find what the sequence or others of its adapter computed."""
        self._prefixes.discard(sequence)
        return self.end(sequence)

    def check_integrity(self) -> None:
        """Raise RuntimeError if the KV space and the running sequences disagree."""
        self._space.check_integrity()
        self._prefixes.cache.check_integrity()
        if not self._running and self.num_reserved_cells:
            raise RuntimeError("cells are held although nothing runs")

    def _forget(self, digest: str | None) -> None:
        self._num_by_adapter[digest] -= 1
        if not self._num_by_adapter[digest]:
            del self._num_by_adapter[digest]

    def _move_for(self, num_tokens: int) -> None:
        """Move sequences together if only free cells that are scattered suffice."""
        moves = self._space.make_gap(num_tokens)
        if not moves:
            return
        by_start = {_allocation(one).starts[0]: one for one in self._running.values()}
        for move in moves:
            sequence = by_start[move.source]
            sequence.allocation = replace(_allocation(sequence), starts=(move.target,))
            if has_begun(sequence):  # what an adapter gives is written with the first piece
                self.moved.append(sequence)
                copy = CellCopy(move.source, move.target, sequence.num_computed)
                self._prefixes.add_copies([copy])

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_running:
            sequence = self._waiting[0]
            self._move_for(sequence.max_tokens)
            sequence.allocation = self._prefixes.reserve(sequence, self._space)
            if sequence.allocation is None:
                return
            self._waiting.popleft()
            sequence.phase = Phase.PREFILL
            sequence.num_computed = sequence.num_given
            self._running[sequence.id] = sequence


def _allocation(sequence: Sequence) -> Allocation:
    """The cells of a sequence that runs."""
    assert sequence.allocation is not None
    return sequence.allocation


def _take(sequence: Sequence, token_ids: Seq[int]) -> tuple[int, FinishReason | None]:
    """Add tokens up to the one with which the sequence ends; how many, and why."""
    for number, token_id in enumerate(token_ids, start=1):
        reason = sequence.take(token_id)
        if reason is not None:
            return number, reason
    return len(token_ids), None


def _may_go_on(sequence: Sequence) -> bool:
    """Whether a sequence decodes and has not all the tokens it may have, read or not."""
    is_full = sequence.num_output >= sequence.sampling.max_new_tokens
    return sequence.phase is Phase.DECODE and not is_full
