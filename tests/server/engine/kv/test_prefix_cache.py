"""Blocks by key: what is found is what was kept, whoever comes and goes."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamic_lora_server.engine.kv.layout import KVLayout, contiguous_layout, paged_layout
from dynamic_lora_server.engine.kv.prefix_cache import CellCopy, Found, PrefixCache, block_keys
from dynamic_lora_server.engine.kv.space import PagedSpace
from dynamic_lora_server.engine.scheduler import Scheduler
from dynamic_lora_server.engine.sequence import Phase, Sequence
from tests.support.engines import advance, make_sequence

Token = tuple[tuple[int, ...], tuple[str | None, ...]]


@dataclass
class FakeAdapter:
    """As much of a resident adapter as the bookkeeping looks at."""

    digest: str
    invocation_ids: tuple[int, ...] = ()
    rows: Any = None


@dataclass
class FakePrompt:
    num_tokens: int
    keys: tuple[int, ...] = (1,)


@dataclass
class FakeRows:
    prompt: FakePrompt


ADAPTERS: list[Any] = [
    None,
    FakeAdapter("a"),
    FakeAdapter("b"),
    FakeAdapter("invoked", invocation_ids=(1, 2)),
    FakeAdapter("given", rows=FakeRows(FakePrompt(3))),
    FakeAdapter("virtual", rows=FakeRows(FakePrompt(5, keys=()))),
]


def small_layout(*, paged: bool, num_cells: int, max_pages: int | None = None) -> KVLayout:
    """Blocks of 2 tokens, pages of 6; 5 blocks are set aside where there are no pages."""
    if paged:
        space = PagedSpace(num_cells // 6, 6)
        return KVLayout(
            space=space,
            prefixes=PrefixCache(space, block_size=2, shared=True, max_pages=max_pages),
            num_cells=space.num_cells,
        )
    layout = contiguous_layout(num_cells, window=1, most_used=num_cells, prefix_cells=0)
    aside = PagedSpace(5, 2, first_cell=num_cells)
    return KVLayout(
        space=layout.space,
        prefixes=PrefixCache(aside, block_size=2, shared=False),
        num_cells=num_cells + 10,
    )


@dataclass
class Machine:
    """Runs a scheduler's steps on cells that remember what was written to them.

    The entry of a token is all tokens up to it and who acted on each: what
    real keys and values depend on.
    """

    layout: KVLayout
    prefill_chunk: int = 9
    scheduler: Scheduler = field(init=False)
    cells: dict[int, Token] = field(default_factory=dict)
    num_run: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            self.layout.space,
            max_running=3,
            prefill_chunk=self.prefill_chunk,
            prefixes=self.layout.prefixes,
        )

    def step(self) -> None:
        pieces = self.scheduler.schedule()
        for copy in self.scheduler.take_copies():
            for i in range(copy.num_cells):
                self.cells[copy.target + i] = self.cells[copy.source + i]
        for piece in pieces:
            sequence, start = piece.sequence, piece.sequence.num_computed
            assert start >= sequence.num_given
            first = 0 if start == sequence.num_given else start
            self.write(sequence, first, start + piece.num_tokens)
            self.num_run += piece.num_tokens
        for piece in pieces:
            self.check(piece.sequence, piece.sequence.num_computed + piece.num_tokens)
        for piece in pieces:
            # One of the tokens that prompts are made of.
            token = 1 + (piece.sequence.seed + piece.sequence.num_tokens // 2) % 2
            advance(self.scheduler, piece, *([token] if piece.samples else []))
        self.scheduler.check_integrity()

    def write(self, sequence: Sequence, start: int, stop: int) -> None:
        assert sequence.allocation is not None
        for position in range(start, stop):
            self.cells[sequence.allocation.cell(position)] = entry(sequence, position)

    def check(self, sequence: Sequence, stop: int) -> None:
        """All that attention reads is what the sequence would have computed itself."""
        assert sequence.allocation is not None
        for position in range(stop):
            found = self.cells[sequence.allocation.cell(position)]
            assert found == entry(sequence, position), (sequence.id, position)


def entry(sequence: Sequence, position: int) -> Token:
    owners = [
        sequence.adapter_digest if i < sequence.num_virtual or i >= sequence.active_from else None
        for i in range(position + 1)
    ]
    return tuple(sequence.tokens(0, position + 1)), tuple(owners)


@dataclass(frozen=True)
class Request:
    """A prompt of its own, or the next turn after a request before."""

    adapter: int
    prompt: list[int]
    num_tokens: int
    after: int | None

    def make(self, before: list[Sequence]) -> Sequence:
        if self.after is None or not before:
            adapter, prompt = ADAPTERS[self.adapter], self.prompt
        else:
            first = before[self.after % len(before)]
            adapter = first.adapter
            said = [*first.prompt_ids[first.num_virtual :], *first.output_ids]
            prompt = [*said, *self.prompt][:45]
        return make_sequence(
            prompt, adapter=adapter, max_new_tokens=self.num_tokens, seed=len(before)
        )


REQUESTS = st.builds(
    Request,
    adapter=st.integers(0, len(ADAPTERS) - 1),
    prompt=st.lists(st.integers(1, 2), min_size=1, max_size=20),
    num_tokens=st.integers(1, 6),
    after=st.none() | st.integers(0, 30),
)


@dataclass(frozen=True)
class Discarding:
    """The end of a request before, of which nobody is to find anything."""

    number: int


# A request, a step, or the end of one of those before, by its cancellation or by its numbers.
MOVES = st.lists(
    st.one_of(
        REQUESTS,
        st.none(),
        st.none(),
        st.integers(0, 30),
        st.builds(Discarding, st.integers(0, 30)),
    ),
    min_size=5,
    max_size=40,
)


@pytest.mark.parametrize(
    ("paged", "max_pages"),
    [(False, None), (True, None), (True, 2)],
    ids=["contiguous", "paged", "few pages"],
)
@given(moves=MOVES)
@settings(max_examples=150, deadline=None)
def test_what_is_found_is_what_would_have_been_computed(
    paged: bool, max_pages: int | None, moves: list[Request | Discarding | int | None]
) -> None:
    machine = Machine(small_layout(paged=paged, num_cells=60, max_pages=max_pages))
    sequences: list[Sequence] = []
    for move in moves:
        if move is None:
            machine.step()
        elif isinstance(move, int):
            if sequences:
                machine.scheduler.end(sequences[move % len(sequences)])
                machine.scheduler.check_integrity()
        elif isinstance(move, Discarding):
            if sequences:
                machine.scheduler.discard(sequences[move.number % len(sequences)])
                machine.scheduler.check_integrity()
        else:
            sequences.append(move.make(sequences))
            machine.scheduler.add(sequences[-1])
    for _ in range(2000):
        if not machine.scheduler.has_work:
            break
        machine.step()
    assert all(sequence.phase is Phase.ENDED for sequence in sequences)
    stats = machine.scheduler.prefix_stats()
    looked_up = [s for s in sequences if s.num_computed]
    assert stats.num_reused == sum(s.num_cached_prompt for s in sequences)
    assert stats.num_looked_up <= sum(s.num_prompt for s in looked_up)
    machine.scheduler.forget_prefixes()
    assert machine.layout.space.num_free == machine.layout.space.num_cells
    machine.scheduler.check_integrity()


def run(machine: Machine, *sequences: Sequence) -> None:
    for sequence in sequences:
        machine.scheduler.add(sequence)
    while machine.scheduler.has_work:
        machine.step()


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_the_second_of_two_prompts_computes_what_differs(paged: bool) -> None:
    machine = Machine(small_layout(paged=paged, num_cells=60))
    first = make_sequence([1, 2, 1, 1, 2, 2, 1, 1, 1], max_new_tokens=1)
    second = make_sequence([1, 2, 1, 1, 2, 2, 1, 1, 2], max_new_tokens=1)
    run(machine, first)
    assert (machine.num_run, first.num_reused) == (9, 0)
    run(machine, second)
    assert (machine.num_run, second.num_reused) == (10, 8)
    stats = machine.scheduler.prefix_stats()
    assert (stats.num_looked_up, stats.num_reused, stats.num_blocks) == (18, 8, 4)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_the_next_turn_begins_with_the_answer_before(paged: bool) -> None:
    machine = Machine(small_layout(paged=paged, num_cells=60))
    first = make_sequence([1, 2, 1], max_new_tokens=6)
    run(machine, first)
    said = [*first.prompt_ids, *first.output_ids]
    second = make_sequence([*said, 1, 2, 2], max_new_tokens=1)
    run(machine, second)
    # The last token was never run.
    assert (len(said), second.num_reused, second.num_run) == (9, 8, 4)


def test_a_prompt_waits_for_what_another_computes_in_the_same_step() -> None:
    layout = contiguous_layout(1000, window=100, most_used=1000, prefix_cells=200)
    machine = Machine(layout, prefill_chunk=200)
    template = [1] * 70
    first, second = (make_sequence([*template, i], max_new_tokens=2) for i in (2, 3))
    other = make_sequence([*template[:60], *[4] * 20], max_new_tokens=2)  # less than 64 alike
    for sequence in (first, second, other):
        machine.scheduler.add(sequence)
    machine.step()
    assert [s.num_computed for s in (first, second, other)] == [71, 0, 80]
    machine.step()
    assert [s.num_computed for s in (first, second, other)] == [72, 71, 81]
    assert second.num_reused == 64


def test_prompts_that_wait_are_looked_up_in_few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = contiguous_layout(100_000, window=100, most_used=90_000, prefix_cells=5000)
    scheduler = Scheduler(layout.space, max_running=64, prefill_chunk=32, prefixes=layout.prefixes)
    template = [1] * 2000
    known = make_sequence(template, max_new_tokens=1)
    scheduler.add(known)
    while scheduler.has_work:
        for piece in scheduler.schedule():
            advance(scheduler, piece, *([1] if piece.samples else []))
    num_finds = 0
    find = PrefixCache.find

    def counting(self: PrefixCache, keys: Seq[bytes]) -> list[Found]:
        nonlocal num_finds
        num_finds += 1
        return find(self, keys)

    monkeypatch.setattr(PrefixCache, "find", counting)
    sequences = [make_sequence([*template, *[2] * 40]) for _ in range(64)]
    for sequence in sequences:
        scheduler.add(sequence)
    pieces = scheduler.schedule()
    assert 0 < num_finds <= len(pieces) < 64
    assert [piece.sequence.num_reused for piece in pieces] == [2000] * len(pieces)


def test_what_does_not_last_is_neither_kept_nor_waited_for() -> None:
    layout = contiguous_layout(1000, window=100, most_used=1000, prefix_cells=300)
    scheduler = Scheduler(layout.space, max_running=8, prefill_chunk=100, prefixes=layout.prefixes)
    prompt = [1] * 150

    def step(*, lasting: bool) -> list[int]:
        pieces = scheduler.schedule()
        for piece in pieces:
            tokens = [1] if piece.samples else []
            scheduler.begin(piece, lasting=lasting)
            scheduler.settle(piece, tokens)
        return [piece.num_tokens for piece in pieces]

    first = make_sequence(prompt, max_new_tokens=30)
    scheduler.add(first)
    step(lasting=True)
    step(lasting=False)
    for _ in range(29):
        step(lasting=True)
    assert (first.phase, scheduler.prefix_stats().num_blocks) == (Phase.ENDED, 100 // 16)
    others = [make_sequence([token] * 90, max_new_tokens=2) for token in (2, 2, 2)]
    for one in others:
        scheduler.add(one)
    assert step(lasting=False) == [90]
    assert step(lasting=False) == [1, 90, 10]
    again = make_sequence(prompt, max_new_tokens=1)
    scheduler.add(again)
    while scheduler.has_work:
        step(lasting=True)
    assert (again.num_reused, others[2].num_reused) == (96, 0)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_the_last_token_of_a_known_prompt_is_computed(paged: bool) -> None:
    machine = Machine(small_layout(paged=paged, num_cells=60))
    run(machine, make_sequence([1] * 6, max_new_tokens=1))
    again = make_sequence([1] * 6, max_new_tokens=1)
    run(machine, again)
    assert (again.num_reused, again.num_run) == (4, 2)


def test_a_full_page_is_shared_and_a_part_of_one_copied() -> None:
    machine = Machine(small_layout(paged=True, num_cells=60))
    first = make_sequence([1] * 9, max_new_tokens=4)
    machine.scheduler.add(first)
    machine.step()
    second = make_sequence([1] * 10, max_new_tokens=4)
    machine.scheduler.add(second)
    (_, piece) = machine.scheduler.schedule()
    assert first.allocation is not None
    assert second.allocation is not None
    shared, own = second.allocation.starts[:2]
    assert shared == first.allocation.starts[0]
    assert own != first.allocation.starts[1]
    assert machine.scheduler.take_copies() == [CellCopy(first.allocation.starts[1], own, 2)]
    assert (piece.sequence.num_reused, piece.num_tokens) == (8, 2)


def test_a_prompt_is_admitted_without_room_for_what_it_shares() -> None:
    machine = Machine(small_layout(paged=True, num_cells=30), prefill_chunk=30)
    first, second = (make_sequence([1] * 14, max_new_tokens=n) for n in (4, 8))
    machine.scheduler.add(first)
    machine.step()
    # Two of five pages are free; the second has four, two of them full ones of the first.
    machine.scheduler.add(second)
    machine.step()
    assert (first.phase, second.num_reused) == (Phase.DECODE, 12)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_cells_are_used_when_they_are_filled(paged: bool) -> None:
    machine = Machine(small_layout(paged=paged, num_cells=60), prefill_chunk=30)
    first, second = (make_sequence([1] * 14, max_new_tokens=n) for n in (4, 8))
    scheduler = machine.scheduler
    machine.scheduler.add(first)
    assert (scheduler.num_used_cells, scheduler.num_reserved_cells) == (0, 0)
    machine.step()
    assert (scheduler.num_used_cells, scheduler.num_reserved_cells) == (14, 18)
    machine.scheduler.add(second)
    machine.step()
    # Where there are pages, two of six cells are shared.
    shared = 12 if paged else 0
    assert scheduler.num_used_cells == 15 + 14 - shared
    assert scheduler.num_reserved_cells == (18 + 24 - shared if paged else 18 + 22)
    run(machine)
    assert (scheduler.num_used_cells, scheduler.num_reserved_cells) == (0, 0)


def test_pages_that_somebody_will_begin_with_are_not_evicted() -> None:
    machine = Machine(small_layout(paged=True, num_cells=24), prefill_chunk=30)
    run(machine, make_sequence([1] * 13, max_new_tokens=1))
    again, other = make_sequence([1] * 13, max_new_tokens=5), make_sequence([2] * 9)
    machine.scheduler.add(again)
    machine.scheduler.add(other)
    machine.step()
    assert (again.num_reused, other.phase) == (12, Phase.WAITING)
    run(machine)


def test_pages_that_nobody_needs_give_way_to_sequences() -> None:
    machine = Machine(small_layout(paged=True, num_cells=24))
    run(machine, make_sequence([1] * 12, max_new_tokens=1))
    space = machine.layout.space
    assert (space.num_free, machine.scheduler.num_reserved_cells) == (12, 0)
    run(machine, make_sequence([2] * 20, max_new_tokens=4))
    assert machine.scheduler.prefix_stats().num_evictions > 0


def test_a_prompt_does_not_evict_its_own_beginning() -> None:
    machine = Machine(small_layout(paged=False, num_cells=60))
    run(machine, make_sequence([1] * 25, max_new_tokens=1))
    stats = machine.scheduler.prefix_stats()
    assert (stats.num_blocks, stats.num_evictions) == (5, 0)
    again = make_sequence([1] * 25, max_new_tokens=1)
    run(machine, again)
    assert again.num_reused == 10


def test_the_block_used_longest_ago_goes_first() -> None:
    cache = PrefixCache(PagedSpace(3, 2, first_cell=50), block_size=2, shared=False)
    allocation = PagedSpace(4, 2).allocate(8)
    old, new, newer = (
        block_keys(ids, block_size=2, owner=None) for ids in ([1, 1, 2, 2], [3, 3], [4, 4, 5, 5])
    )
    cache.keep(old, range(2), allocation)
    cache.keep(new, range(1), allocation)
    cache.reuse(cache.find(old[:1]), allocation)
    cache.keep(newer, range(2), allocation)
    # The end of `old` went before its beginning, which had been used again; then `new` went.
    assert [len(cache.find(keys)) for keys in (old, new, newer)] == [1, 0, 2]
    assert cache.stats().num_evictions == 2


def test_blocks_next_to_each_other_are_copied_in_one_go() -> None:
    cache = PrefixCache(PagedSpace(4, 2, first_cell=50), block_size=2, shared=False)
    allocation = PagedSpace(1, 8).allocate(8)
    keys = block_keys([1, 2, 3, 4, 5, 6, 7], block_size=2, owner=None)
    assert cache.keep(keys, range(3), allocation) == [CellCopy(0, 50, 6)]
    assert cache.reuse(cache.find(keys[:2]), allocation) == (allocation, [CellCopy(50, 0, 4)])


def test_a_full_cache_copies_a_prompt_in_one_go() -> None:
    cache = PrefixCache(PagedSpace(8, 2, first_cell=50), block_size=2, shared=False)
    allocation = PagedSpace(1, 16).allocate(16)
    for token in range(3):
        keys = block_keys([token] * 16, block_size=2, owner=None)
        assert cache.keep(keys, range(8), allocation) == [CellCopy(0, 50, 16)]
        cache.check_integrity()
    assert cache.stats().num_evictions == 16


def test_a_limit_on_pages_is_kept() -> None:
    space = PagedSpace(6, 2)
    cache = PrefixCache(space, block_size=2, shared=True, max_pages=2)
    keys = block_keys(range(10), block_size=2, owner=None)
    allocation = space.allocate(10)
    cache.keep(keys, range(5), allocation)
    space.free(allocation)
    assert cache.stats().num_blocks == 2
    assert space.num_free == space.num_cells - 4


def test_keys_tell_apart_all_that_content_depends_on() -> None:
    ids = [1, 2, 3, 4, 5, 6]
    base = block_keys(ids, block_size=2, owner=None)
    assert len(base) == 3
    assert block_keys([*ids, 7], block_size=2, owner=None) == base
    others = [
        block_keys(ids, block_size=2, owner="a"),
        block_keys(ids, block_size=2, owner="b"),
        block_keys([9, *ids[1:]], block_size=2, owner=None),
    ]
    assert len({base, *others}) == len({key for keys in (base, *others) for key in keys}) / 3 == 4


def test_blocks_before_an_invocation_are_the_base_models() -> None:
    ids = [1, 2, 3, 4, 5, 6]
    base = block_keys(ids, block_size=2, owner=None)
    never, at_four, at_three = (
        block_keys(ids, block_size=2, owner="a", active_from=start) for start in (9, 4, 3)
    )
    assert never == base
    assert at_four[:2] == base[:2]
    assert at_three[:1] == base[:1]
    assert not {at_four[2], at_three[1], at_three[2]} & set(base)
    # Where in a block the adapter begins to act makes a difference.
    assert at_three[1] != block_keys(ids, block_size=2, owner="a", active_from=2)[1]


def test_forgetting_leaves_shared_pages_to_their_sequences() -> None:
    space = PagedSpace(6, 2)
    cache = PrefixCache(space, block_size=2, shared=True)
    keys = block_keys([1, 2, 3, 4], block_size=2, owner=None)
    allocation = space.allocate(4)
    cache.keep(keys, range(2), allocation)
    cache.clear()
    assert cache.find(keys) == []
    assert space.num_free == 8
    space.free(allocation)
    assert space.num_free == space.num_cells
    cache.check_integrity()


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_of_a_sequence_that_is_discarded_nothing_is_found(paged: bool) -> None:
    machine = Machine(small_layout(paged=paged, num_cells=120))
    _, a, b, *_ = ADAPTERS
    run(machine, *(make_sequence([1] * 3, adapter=one, max_new_tokens=1) for one in (None, a, b)))
    broken = make_sequence([1, 1, 2, 2, 2], adapter=a, max_new_tokens=9)
    machine.scheduler.add(broken)
    machine.step()
    assert broken.num_reused == 2
    assert machine.scheduler.prefix_stats().num_blocks == 4
    assert machine.scheduler.discard(broken)
    assert not machine.scheduler.discard(broken)
    machine.scheduler.check_integrity()
    assert machine.scheduler.prefix_stats().num_blocks == 2
    later = [make_sequence([1] * 3, adapter=one, max_new_tokens=1) for one in (None, a, b)]
    run(machine, *later)
    assert [one.num_reused for one in later] == [2, 0, 2]


def test_disagreements_are_reported() -> None:
    cache = PrefixCache(PagedSpace(2, 2), block_size=2, shared=False)
    keys = block_keys([1, 2], block_size=2, owner=None)
    cache.keep(keys, range(1), PagedSpace(1, 2).allocate(2))
    assert cache.find(keys) == [Found(0, 1)]
    cache.check_integrity()
    cache._pages.let_go(0)
    with pytest.raises(RuntimeError, match="a page of the prefix cache is free"):
        cache.check_integrity()
    cache._page_of.clear()
    with pytest.raises(RuntimeError, match="blocks and their pages disagree"):
        cache.check_integrity()


def test_cells_are_set_aside_that_the_longest_sequence_does_not_need() -> None:
    def aside(num_cells: int, prefix_cells: int | None = None) -> int:
        layout = contiguous_layout(
            num_cells, window=512, most_used=10**6, prefix_cells=prefix_cells
        )
        return layout.num_cells - layout.space.num_cells

    assert aside(8192) == 2048
    assert aside(550) == 32
    assert aside(512) == 0
    # It does not fit in any case.
    assert aside(500) == 112
    assert aside(500, prefix_cells=100) == 96
    assert not contiguous_layout(500, window=512, most_used=9, prefix_cells=0).prefixes.enabled
    paged = paged_layout(1000, page_size=256, most_used=10**6, prefix_cells=0)
    assert (paged.num_cells, paged.prefixes.enabled) == (768, False)
