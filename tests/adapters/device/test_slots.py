import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamic_lora_adapters.device.groups import GroupShape, ProjectionGroup
from dynamic_lora_adapters.device.slab import ResidentAdapter, Slab
from dynamic_lora_adapters.device.slab_layout import SlabKind
from dynamic_lora_adapters.device.slots import SHORT_DTYPES, SLAB_SLOTS, AdapterPool
from dynamic_lora_adapters.device.upload import HostUpload, Places, Sources
from dynamic_lora_adapters.errors import AdapterCapacityError
from dynamic_lora_adapters.kernels.factor_layout import FactorLayout
from dynamic_lora_adapters.rows import RowTerms
from dynamic_lora_adapters.terms import (
    AdapterTerms,
    EmbeddingTerms,
    LinearTerms,
    ModuleOverride,
    PromptTerms,
)
from tests.support.slabs import hold_writes

GROUPS = [ProjectionGroup(("q", "k"), 16, (16, 8)), ProjectionGroup(("o",), 16, (16,))]
SLOT_BYTES = 8 * (16 + 24) * 4  # an adapter of rank 8 on q alone, in float32

Asked = list[Callable[[], Sequence[torch.Tensor]]]


def factors(rank: int = 8, *, seed: int = 0, path: str = "q") -> AdapterTerms:
    generator = torch.Generator().manual_seed(seed)
    width = {"q": 16, "k": 8, "o": 16}[path]
    linears = {
        path: LinearTerms(
            a=torch.randn(rank, 16, generator=generator),
            b=torch.randn(width, rank, generator=generator),
            rank=rank,
            scaling=1.0,
        )
    }
    return AdapterTerms(linears=linears)


def make_pool(num_slots: int, *, slab_slots: int = SLAB_SLOTS) -> AdapterPool:
    return AdapterPool(
        GROUPS,
        budget_bytes=SLOT_BYTES * num_slots,
        device=torch.device("cpu"),
        dtype=torch.float32,
        slab_slots=slab_slots,
    )


def admit(pool: AdapterPool, digest: str, rank: int = 8) -> ResidentAdapter:
    adapter = pool.admit(digest, factors(rank))
    assert adapter is not None
    return adapter


def test_float16_holds_factors_whose_scaling_is_small() -> None:
    """As a scaling of 1/256 makes them: by themselves below what float16 has eleven bits for."""
    terms = factors(8, seed=3).linears["q"]
    assert terms.a is not None and terms.b is not None
    small = replace(terms, b=terms.b * 1e-3 / 256)
    half = AdapterPool(
        GROUPS,
        budget_bytes=2**20,
        device=torch.device("cpu"),
        dtype=torch.float16,
        slab_slots=1,
        merges=True,
    )
    adapter = half.admit("a", AdapterTerms(linears={"q": small}))
    assert adapter is not None and adapter.exact is not None
    kept, exact = adapter.slab.terms(0, adapter.slot), adapter.exact[0]
    assert kept.a is not None and kept.b is not None and exact.a is not None
    assert small.b is not None
    delta = small.b @ terms.a
    difference = (kept.b.float().T[:16] @ kept.a.float() - delta).abs().max()
    assert difference < 1e-3 * delta.abs().max()
    assert exact.a[:8].equal(terms.a)
    assert half.stats().used_bytes == SLOT_BYTES // 2 + SLOT_BYTES


@pytest.mark.parametrize(("merges", "ids"), [(False, ()), (True, (5,))])
def test_rounded_terms_are_kept_exactly_for_merges_alone(
    merges: bool, ids: tuple[int, ...]
) -> None:
    pool = AdapterPool(
        GROUPS,
        budget_bytes=SLOT_BYTES // 2,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        merges=merges,
    )
    adapter = pool.admit("a", replace(factors(seed=3), invocation_ids=ids))
    assert adapter is not None and adapter.exact is None
    kept, terms = adapter.slab.terms(0, adapter.slot), factors(seed=3).linears["q"]
    assert kept.a is not None and kept.b is not None and terms.a is not None
    assert torch.equal(kept.a, terms.a.bfloat16())
    assert terms.b is not None and torch.equal(kept.b[:, :16], terms.b.T.bfloat16())
    assert pool.stats().used_bytes == SLOT_BYTES // 2


def rows_alone() -> AdapterTerms:
    """A prompt, a norm and two rows of the embedding: 64, 32, 64 and 16 bytes."""
    ids = torch.tensor([3, 1])
    return AdapterTerms(
        prompt=PromptTerms(num_tokens=2, embeddings=torch.ones(2, 8)),
        overrides={"norm": ModuleOverride(parameters={"weight": torch.ones(8)})},
        embeddings={"embed": EmbeddingTerms(token_ids=ids, rows=torch.ones(2, 8))},
    )


def test_rows_are_brought_once_there_is_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    brought: list[AdapterTerms] = []
    bring = RowTerms.of

    def counted(terms: AdapterTerms, **where: Any) -> RowTerms | None:
        brought.append(terms)
        return bring(terms, **where)

    monkeypatch.setattr(RowTerms, "of", counted)
    small = AdapterPool(GROUPS, budget_bytes=175, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(AdapterCapacityError, match="needs 176 bytes"):
        small.admit("a", rows_alone())
    pool = AdapterPool(GROUPS, budget_bytes=200, device=torch.device("cpu"), dtype=torch.float32)
    first = pool.admit("a", rows_alone())
    assert first is not None and pool.stats().used_bytes == 176
    second = pool.prepare(rows_alone())
    assert pool.bring("b", second) is None
    assert len(brought) == 1
    pool.release(first)
    assert pool.bring("b", second) is not None
    assert len(brought) == 2
    pool.check_integrity()


def test_what_acts_on_rows_is_a_copy() -> None:
    """What was read may lie in a file that somebody cuts off."""
    terms = rows_alone()
    adapter = make_pool(2).admit("a", terms)
    assert adapter is not None and adapter.rows is not None
    assert terms.prompt is not None and terms.prompt.embeddings is not None
    terms.prompt.embeddings.zero_()
    norm = terms.overrides["norm"].parameters["weight"].zero_()
    assert adapter.rows.prompt is not None and adapter.rows.prompt.embeddings is not None
    assert bool(adapter.rows.prompt.embeddings.all())
    assert not torch.equal(adapter.rows.overrides["norm"]["weight"], norm)


def test_admitted_factors_lie_in_the_slot() -> None:
    pool = make_pool(2)
    adapter = pool.admit("a", factors(5, seed=3))
    assert adapter is not None
    expected = factors(5, seed=3).linears["q"]
    a, b = adapter.slab.a[0], adapter.slab.b[0]
    assert a is not None and b is not None
    assert expected.a is not None and expected.b is not None
    torch.testing.assert_close(
        b[adapter.slot].T @ a[adapter.slot],
        torch.cat([expected.b @ expected.a, torch.zeros(8, 16)]),
    )
    assert adapter.slab.a[1] is None


def test_factors_may_be_kept_in_a_dtype_of_their_own() -> None:
    """Half the memory; what is no factor stays in the pool's dtype."""
    pool = AdapterPool(
        GROUPS,
        budget_bytes=SLOT_BYTES // 2 + 24 * 4,
        device=torch.device("cpu"),
        dtype=torch.float32,
        factor_dtype=torch.bfloat16,
    )
    terms = factors(seed=3).linears["q"]
    bias = torch.randn(16)
    adapter = pool.admit("a", AdapterTerms(linears={"q": replace(terms, bias=bias)}))
    assert adapter is not None and terms.a is not None and terms.b is not None
    held = adapter.slab.terms(0, adapter.slot)
    assert held.a is not None and held.b is not None and held.bias is not None
    torch.testing.assert_close(held.a, terms.a.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(held.b[:, :16], terms.b.T.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(held.bias[:16], bias, rtol=0, atol=0)
    assert pool.stats().used_bytes == pool.stats().budget_bytes


@pytest.mark.parametrize("dtype", SHORT_DTYPES)
def test_factors_that_sixteen_bits_hold_are_shortened(dtype: torch.dtype) -> None:
    """Without loss, beside others of their shape; with one more digit they stay as they are."""
    pool = AdapterPool(
        GROUPS,
        budget_bytes=100 * SLOT_BYTES,
        device=torch.device("cpu"),
        dtype=torch.float32,
        shortens=True,
        slab_slots=2,
    )
    terms = factors(seed=3).linears["q"]
    assert terms.a is not None and terms.b is not None
    short = replace(terms, a=terms.a.to(dtype).float(), b=terms.b.to(dtype).float())
    assert short.a is not None and short.b is not None
    nearly = replace(short, b=short.b.clone())
    assert nearly.b is not None
    nearly.b[-1, -1] = 0.1
    held = {}
    for name, one in {"long": terms, "short": short, "nearly": nearly}.items():
        adapter = pool.admit(name, AdapterTerms(linears={"q": one}))
        assert adapter is not None
        held[name] = adapter
    assert held["long"].slab is held["nearly"].slab is not held["short"].slab
    assert held["short"].slab.mixed and not held["long"].slab.mixed
    assert held["short"].size == held["long"].size / 2
    for name, one in {"short": short, "nearly": nearly}.items():
        found = held[name].slab.terms(0, held[name].slot)
        assert found.a is not None and found.b is not None
        assert one.a is not None and one.b is not None
        assert found.a.dtype == (dtype if name == "short" else torch.float32)
        assert torch.equal(found.a.float(), one.a)
        assert torch.equal(found.b[:, :16].T.float(), one.b)
    assert pool.stats().used_bytes == 2 * SLOT_BYTES + 2 * SLOT_BYTES // 2
    pool.check_integrity()


def test_the_size_of_an_adapter_is_told_in_adapters_of_rank_16_on_every_layer() -> None:
    pool = make_pool(100)
    everything = {path: factors(16, path=path).linears[path] for path in ("q", "k", "o")}
    whole = pool.admit("whole", AdapterTerms(linears=everything))
    twice = pool.admit(
        "twice",
        AdapterTerms(linears={path: factors(32, path=path).linears[path] for path in everything}),
    )
    assert whole is not None and twice is not None
    assert (whole.size, twice.size) == (1.0, 2.0)
    # 8 of the 32 ranks of the first group, and nothing of the second.
    assert admit(pool, "small").size == 8 * 40 / (32 * 40 + 16 * 32)


def test_least_recently_used_idle_adapter_is_evicted() -> None:
    pool = make_pool(2)
    a, b = admit(pool, "a"), admit(pool, "b")
    pool.release(a)
    pool.release(b)
    again = pool.lease("a")
    assert again is a
    pool.release(a)
    admit(pool, "c")
    assert pool.resident_digests() == ["a", "c"]
    assert pool.stats().num_evictions == 1
    pool.check_integrity()


def test_leased_adapters_are_never_evicted() -> None:
    pool = make_pool(1)
    a = admit(pool, "a")
    assert pool.admit("b", factors()) is None
    pool.release(a)
    assert pool.admit("b", factors()) is not None
    assert pool.lease("a") is None


def test_nobody_is_evicted_in_vain() -> None:
    """A slab gives its memory back only as a whole: one who is leased keeps it."""
    pool = make_pool(4)
    kept = admit(pool, "kept")
    for name in "bc":
        pool.release(admit(pool, name))
    assert pool.admit("larger", factors(24)) is None
    assert pool.stats().num_evictions == 0 and pool.stats().num_resident == 3
    pool.release(kept)
    assert pool.admit("larger", factors(24)) is not None
    assert pool.resident_digests() == ["larger"]
    pool.check_integrity()


def test_who_is_in_nobodys_way_stays() -> None:
    """The eldest has its slab in common with one who is leased: it would give nothing back."""
    pool = make_pool(4, slab_slots=2)
    adapters = {name: admit(pool, name) for name in "abcd"}
    for name in "acd":
        pool.release(adapters[name])
    admit(pool, "larger", 16)
    assert set(pool.resident_digests()) == {"a", "b", "larger"}
    admit(pool, "as large")
    assert set(pool.resident_digests()) == {"b", "larger", "as large"}
    pool.check_integrity()


def test_room_that_nobody_has_reached_is_given_up_before_anybody_leaves() -> None:
    """Also by slabs whose adapters are leased, which stay where they are."""
    pool = make_pool(3 * SLAB_SLOTS)
    ranks = [8 * number for number in range(1, 7)]  # 21 slots of rank 8 in all
    adapters = [admit(pool, str(rank), rank) for rank in ranks]
    assert pool.stats().num_evictions == 0 and pool.stats().num_resident == len(ranks)
    pool.check_integrity()
    assert pool.stats().used_bytes >= 21 * SLOT_BYTES
    for rank, adapter in zip(ranks, adapters, strict=True):
        found, expected = adapter.slab.terms(0, adapter.slot), factors(rank).linears["q"]
        assert found.a is not None and expected.a is not None
        assert torch.equal(found.a, expected.a)
    assert pool.admit("more", factors(32)) is None
    pool.release(adapters[-1])
    admit(pool, "more", 32)
    assert pool.stats().num_evictions == 1
    pool.check_integrity()


def test_as_many_of_one_shape_lie_in_one_slab() -> None:
    pool = make_pool(2 * SLAB_SLOTS)
    first = admit(pool, "0")
    for number, rank in enumerate((16, 24, 32)):
        pool.release(admit(pool, f"other {number}", rank))
        pool.drop(f"other {number}")
    assert all(admit(pool, str(number)).slab is first.slab for number in range(1, SLAB_SLOTS))


def test_nothing_is_given_up_in_vain() -> None:
    pool = make_pool(SLAB_SLOTS)
    slab = admit(pool, "a").slab
    assert pool.admit("large", factors(8 * SLAB_SLOTS)) is None
    assert len(slab.tenants) == SLAB_SLOTS


def test_rows_have_the_room_of_empty_slots_but_that_of_their_adapter() -> None:
    pool = make_pool(4)
    terms = factors()
    pool.release(admit(pool, "first"))
    norm = torch.ones(2 * SLOT_BYTES // 4)
    both = replace(terms, overrides={"norm": ModuleOverride(parameters={"weight": norm})})
    adapter = pool.admit("rows", both)
    assert adapter is not None and adapter.slot == 1
    assert pool.stats().num_evictions == 0
    assert pool.stats().used_bytes == 4 * SLOT_BYTES
    pool.check_integrity()


def test_where_memory_is_taken_at_once_half_of_it_is_left_to_other_shapes() -> None:
    pool = AdapterPool(
        GROUPS,
        budget_bytes=4 * SLAB_SLOTS * SLOT_BYTES,
        device=torch.device("meta"),
        dtype=torch.float32,
    )
    sizes = [len(admit(pool, str(rank), rank).slab.tenants) for rank in (8, 16, 24, 32)]
    assert sizes == [8, 6, 2, 1]
    pool.check_integrity()


def test_adapter_over_the_whole_budget_is_refused_with_both_numbers() -> None:
    pool = make_pool(1)
    with pytest.raises(AdapterCapacityError, match=f"needs {2 * SLOT_BYTES} bytes.*{SLOT_BYTES}"):
        pool.admit("big", factors(16))


def test_dropping_returns_the_bytes_after_the_last_lease() -> None:
    pool = make_pool(4)
    a = admit(pool, "a")
    pool.drop("a")
    assert pool.lease("a") is None
    assert pool.stats().used_bytes > 0
    pool.release(a)
    assert pool.stats().used_bytes == 0
    pool.check_integrity()


def test_dropping_an_unknown_adapter_does_nothing() -> None:
    pool = make_pool(1)
    pool.drop("nobody")
    assert pool.stats().num_resident == 0


def test_adapters_of_other_shapes_get_their_own_slabs() -> None:
    pool = make_pool(2 * SLAB_SLOTS + 2)
    a, b, c = admit(pool, "a", 8), admit(pool, "b", 16), admit(pool, "c", 3)
    assert a.slab is c.slab
    assert a.slab is not b.slab
    assert a.slab.signature == (GroupShape(8), GroupShape())
    assert b.slab.signature == (GroupShape(16), GroupShape())


def test_admitting_a_resident_adapter_shares_its_slot() -> None:
    pool = make_pool(2)
    assert admit(pool, "a") is admit(pool, "a")
    assert pool.stats().num_loads == 1


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["use", "end", "drop"])), max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_sequence_of_uses_keeps_the_pool_sound(moves: list[tuple[int, str]]) -> None:
    pool = make_pool(5)
    held: dict[int, list[ResidentAdapter]] = {}
    for number, move in moves:
        digest, rank = f"adapter {number}", 8 * (1 + number % 3)
        if move == "use":
            adapter = pool.lease(digest) or pool.admit(digest, factors(rank))
            if adapter is not None:
                held.setdefault(number, []).append(adapter)
        elif move == "end" and held.get(number):
            pool.release(held[number].pop())
        elif move == "drop":
            pool.drop(digest)
        pool.check_integrity()
    for adapters in held.values():
        for adapter in adapters:
            pool.release(adapter)
    pool.check_integrity()
    assert pool.stats().num_leased == 0


def test_threads_may_use_the_pool_at_once() -> None:
    pool = make_pool(3)

    def work(offset: int) -> None:
        for step in range(100):
            digest = f"adapter {(step + offset) % 5}"
            adapter = pool.lease(digest) or pool.admit(digest, factors())
            if adapter is not None:
                pool.release(adapter)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pool.check_integrity()
    assert pool.stats().num_leased == 0


def test_an_upload_is_awaited_once() -> None:
    class Event:
        num_waits = 0

        def wait(self) -> None:
            self.num_waits += 1

    adapter, event = admit(make_pool(1), "a"), Event()
    assert adapter.uploaded is None
    adapter.uploaded = cast(torch.cuda.Event, event)
    adapter.await_upload()
    adapter.await_upload()
    assert event.num_waits == 1


def test_spread_rows_hold_the_same_and_their_gaps_are_counted() -> None:
    """Rows of 16 and 24 floats, of which 16 and 32 fill whole lines: 1 and 3 lines are odd."""
    pool = AdapterPool(
        GROUPS,
        budget_bytes=2**20,
        device=torch.device("cpu"),
        dtype=torch.float32,
        layout=FactorLayout.SPREAD,
    )
    terms = AdapterTerms(linears={**factors(seed=1).linears, **factors(seed=2, path="o").linears})
    adapter = pool.admit("a", terms)
    assert adapter is not None
    close = make_pool(10 * SLAB_SLOTS).admit("a", terms)
    assert close is not None
    for tables, others, line in zip(adapter.slab.b, close.slab.b, (48, 16), strict=True):
        assert tables is not None and others is not None
        assert tables.stride(1) == line
        assert torch.equal(tables[adapter.slot], others[close.slot])
    assert pool.stats().used_bytes == SLAB_SLOTS * 8 * ((16 + 48) + (16 + 16)) * 4


def test_a_slot_that_is_being_written_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(2)
    first = admit(pool, "first")
    writing, go_on = hold_writes(monkeypatch)
    thread = threading.Thread(target=admit, args=(pool, "second"))
    thread.start()
    assert writing.wait(10)
    assert pool.lease("first") is first
    assert pool.lease("second") is None
    assert pool.admit("third", factors()) is None  # its slot is taken, and not to be evicted
    pool.check_integrity()
    go_on.set()
    thread.join()
    assert pool.resident_digests() == ["first", "second"]


def test_two_who_bring_the_same_adapter_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(2)
    both = threading.Barrier(2)
    write = HostUpload.write

    def together(self: HostUpload, sources: Sources, places: Places) -> None:
        both.wait(10)
        write(self, sources, places)

    monkeypatch.setattr(HostUpload, "write", together)
    got: list[ResidentAdapter] = []
    threads = [threading.Thread(target=lambda: got.append(admit(pool, "a"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got[0] is got[1]
    assert got[0].num_leases == 2
    assert pool.stats().num_loads == 1
    pool.check_integrity()
    monkeypatch.undo()
    admit(pool, "b")  # the other's slot is free again


def test_a_write_that_fails_leaves_no_slot_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(1)

    def fail(_upload: HostUpload, _sources: Sources, _places: Places) -> None:
        raise MemoryError("no room on the host")

    with monkeypatch.context() as patched:
        patched.setattr(HostUpload, "write", fail)
        with pytest.raises(MemoryError, match="no room on the host"):
            admit(pool, "a")
    assert pool.stats().used_bytes == 0
    pool.check_integrity()
    admit(pool, "a")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What would be committed in the background."""
    tables: Asked = []
    monkeypatch.setattr(
        "dynamic_lora_adapters.device.slots.populate_soon", lambda find, **_: tables.append(find)
    )
    return tables


def test_the_next_slots_memory_is_asked_for_once(asked: Asked) -> None:
    pool = make_pool(3)
    slab = admit(pool, "a").slab
    assert len(asked) == 1
    (a, b, columns) = asked[0]()
    assert slab.a[0] is not None and slab.b[0] is not None and slab.columns[0] is not None
    assert a.data_ptr() == slab.a[0][1].data_ptr() and a.shape == slab.a[0][1].shape
    assert b.data_ptr() == slab.b[0][1].data_ptr()
    assert columns.data_ptr() == slab.columns[0][1].data_ptr()
    admit(pool, "b")
    assert asked[0]() == [], "its slot has been taken"
    admit(pool, "c")
    assert len(asked) == 2, "there is no slot behind the last"


def test_a_slot_that_is_cut_off_while_it_is_committed_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Callable[[], bool]] = []
    monkeypatch.setattr(
        "dynamic_lora_adapters.device.slots.populate_soon",
        lambda _, *, given_up: asked.append(given_up),
    )
    pool = make_pool(3)
    slab = admit(pool, "a").slab
    assert not asked[0]()
    admit(pool, "wide", rank=16)
    assert len(slab.tenants) == 1
    assert asked[0]()


def test_no_memory_of_a_slab_that_has_gone_is_asked_for(asked: Asked) -> None:
    pool = make_pool(3)
    pool.release(admit(pool, "a"))
    pool.drop("a")
    assert asked[0]() == []


def test_behind_a_full_slab_the_first_slot_of_the_next_is_asked_for(asked: Asked) -> None:
    pool = make_pool(SLAB_SLOTS + 3)
    for number in range(SLAB_SLOTS):
        pool.release(admit(pool, str(number)))
    used = pool.stats().used_bytes
    a, *_ = asked[-1]()
    newest = admit(pool, "newest")
    assert newest.slab.a[0] is not None
    assert newest.slot == 0 and a.data_ptr() == newest.slab.a[0].data_ptr()
    assert len(newest.slab.tenants) == 3, "what the budget has left"
    assert pool.stats().used_bytes == used + newest.slab.num_bytes
    pool.check_integrity()


def test_a_system_without_memory_for_later_costs_no_lease(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, new_slab, numbers = make_pool(2, slab_slots=1), SlabKind.new_slab, count()

    def once(kind: SlabKind, number: int, num_slots: int) -> Slab:
        if next(numbers):
            raise RuntimeError("the system has no memory left")
        return new_slab(kind, number, num_slots)

    monkeypatch.setattr(SlabKind, "new_slab", once)
    pool.release(admit(pool, "a"))
    assert next(numbers) == 2, "one was wanted for later"
    assert asked == []
    pool.drop("a")
    assert pool.stats().used_bytes == 0
    pool.check_integrity()


def test_an_adapter_of_another_shape_takes_the_room_that_was_meant_for_later(asked: Asked) -> None:
    pool = make_pool(SLAB_SLOTS + 3)
    for number in range(SLAB_SLOTS):
        admit(pool, str(number))
    spare = asked[-1]
    assert spare()
    admit(pool, "wide", rank=16)
    assert spare() == [], "it was let go"
    assert pool.stats().num_evictions == 0
    pool.check_integrity()


def test_a_free_slot_is_prepared_before_a_slab_for_later(asked: Asked) -> None:
    pool = make_pool(2 * SLAB_SLOTS + 3)
    for number in range(SLAB_SLOTS + 1):
        pool.release(admit(pool, str(number)))
    pool.drop("3")
    prepared = len(asked)
    assert admit(pool, "in the gap").slot == 3
    assert len(asked) == prepared, "the second slab's next slot is ready, and is what comes next"
