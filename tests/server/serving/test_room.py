"""Who waits for room on the device, who waits behind that, and who does not wait at all.

Leases are held and given back by the tests, so that nothing hangs on how long anything takes.
"""

import asyncio
import math
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dynamic_lora_adapters.compositions import compose
from dynamic_lora_adapters.compositions.composition import Composition, Merge, Part, Strategy
from dynamic_lora_adapters.errors import AdapterCapacityError
from dynamic_lora_adapters.kernels.factor_layout import spread_width
from dynamic_lora_adapters.terms import AdapterTerms
from dynamic_lora_server.errors import NotReady, QueueFull
from dynamic_lora_server.readings import readings_of_demand
from dynamic_lora_server.runtime import Runtime
from dynamic_lora_server.serving import room_line
from tests.support.adapters import make_adapter
from tests.support.eventually import eventually
from tests.support.models import tiny_llama
from tests.support.runtimes import collect, finishes, publish, serving, spec

ROOM_FOR_ONE = 2 * 8 * (64 + spread_width(128, 4)) * 4
MERGED = 2 * 64 * 128 * 4  # what a merge of q_proj takes: a matrix for q, k and v, in both layers


@asynccontextmanager
async def serving_in(
    folder: Path, *, room: int, ranks: dict[str, int], **changes: Any
) -> AsyncIterator[Runtime]:
    """A server with adapters of these ranks on q_proj, and room for so many of rank 8."""
    changes = {"adapter_memory": room * ROOM_FOR_ONE, "mode": "bypass", **changes}
    async with serving(folder, **changes) as runtime:
        for seed, (name, rank) in enumerate(ranks.items()):
            source = make_adapter(
                folder / name, tiny_llama(), rank=rank, targets=["q_proj"], seed=seed
            )
            publish(runtime, name, source)
        yield runtime


class Holding:
    """A request that has its adapter until it is told to end, or waits for it."""

    def __init__(self, runtime: Runtime, name: str) -> None:
        self.has = asyncio.Event()
        self._end = asyncio.Event()
        self._task = asyncio.create_task(self._hold(runtime, name))

    async def _hold(self, runtime: Runtime, name: str) -> None:
        async with runtime.loader.hold(name):
            self.has.set()
            await self._end.wait()

    async def begun(self) -> "Holding":
        """Itself, once it has its adapter."""
        async with asyncio.timeout(60):
            await self.has.wait()
        return self

    async def end(self) -> None:
        """Give the adapter back."""
        self._end.set()
        await self._task

    async def cancel(self) -> None:
        """Give up."""
        self._task.cancel()
        await asyncio.wait({self._task})


def same_shapes(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 8)


def claimed(runtime: Runtime) -> set[str]:
    names = {runtime.registry.resolve(name).digest: name for name in runtime.registry.names()}
    return {names[digest] for digest in runtime.loader.line.claimed}


async def test_who_waits_claims_what_it_needs_and_all_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room_line, "PATIENCE_S", 0.0)
    ranks = {"a": 8, "b": 16, "c": 24, "wide": 24}  # slabs of their own for all but the last
    async with serving_in(tmp_path, room=6, ranks=ranks) as runtime:
        held = {name: await Holding(runtime, name).begun() for name in "abc"}
        wide = Holding(runtime, "wide")
        await eventually(lambda: claimed(runtime) == {"a", "b"}, "the least recently used")
        waiting = Holding(runtime, "a")
        for _ in range(3):
            assert finishes(await asyncio.wait_for(collect(runtime, spec(adapter="c")), 60))
            assert finishes(await asyncio.wait_for(collect(runtime, spec()), 60))
        assert not wide.has.is_set() and not waiting.has.is_set()
        await held["a"].end()
        assert not waiting.has.is_set()  # it would keep its slot for ever
        await held["b"].end()
        await wide.begun()
        await eventually(lambda: claimed(runtime) == {"c"}, "whose turn it is claims, too")
        await held["c"].end()
        await waiting.begun()
        assert not claimed(runtime)
        await waiting.end()
        await wide.end()


async def test_nothing_is_claimed_before_somebody_has_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room_line, "PATIENCE_S", math.inf)
    async with serving_in(tmp_path, room=1, ranks=same_shapes(*"ab")) as runtime:
        first = await Holding(runtime, "a").begun()
        cold = Holding(runtime, "b")
        await eventually(lambda: runtime.loader.line.waited_s > 0, "it waits for room")
        second = await Holding(runtime, "a").begun()
        await first.end()
        third = await Holding(runtime, "a").begun()
        assert not cold.has.is_set()
        await second.end()
        await third.end()
        await (await cold.begun()).end()


async def test_a_claim_is_made_without_any_lease_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room_line, "PATIENCE_S", 0.2)
    async with serving_in(tmp_path, room=1, ranks=same_shapes(*"ab")) as runtime:
        busy = await Holding(runtime, "a").begun()
        cold = Holding(runtime, "b")
        await eventually(lambda: claimed(runtime) == {"a"}, "it has waited for long")
        await busy.end()
        await (await cold.begun()).end()


async def test_a_claim_ends_with_who_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room_line, "PATIENCE_S", 0.0)
    async with serving_in(tmp_path, room=1, ranks=same_shapes(*"ab")) as runtime:
        busy = await Holding(runtime, "a").begun()
        cold = Holding(runtime, "b")
        await eventually(lambda: claimed(runtime) == {"a"}, "a claim")
        waiting = [Holding(runtime, "a") for _ in range(3)]
        await asyncio.sleep(0)
        await cold.cancel()
        assert not claimed(runtime)
        for one in waiting:
            await one.begun()
        for one in (busy, *waiting):
            await one.end()
        assert runtime.stats().adapters.num_loads == 1  # its adapter was there all the time


async def test_whoever_comes_is_served_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large ones among small ones, all of them again and again, and more than fit."""
    monkeypatch.setattr(room_line, "PATIENCE_S", 0.0)
    ranks = same_shapes(*"abcd") | {"wide": 24, "wider": 32}
    async with serving_in(tmp_path, room=4, ranks=ranks, max_waiting=100) as runtime:
        asked = [collect(runtime, spec(adapter=name)) for name in [*ranks, *reversed(ranks)] * 4]
        answers = await asyncio.wait_for(asyncio.gather(*asked), 120)
        assert all(map(finishes, answers))
        assert not claimed(runtime)


async def test_who_waits_for_adapters_leaves_places_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room_line, "PATIENCE_S", math.inf)
    async with serving_in(
        tmp_path, room=1, ranks=same_shapes(*"ab"), max_running=2, max_waiting=2
    ) as runtime:
        busy = await Holding(runtime, "a").begun()
        places = runtime.service.places
        cold = [asyncio.create_task(collect(runtime, spec(adapter="b"))) for _ in range(3)]
        await eventually(lambda: places.num_held_up == 3, "three wait for room")
        with pytest.raises(QueueFull, match="3 continuations wait for adapters that are not on"):
            await collect(runtime, spec(adapter="b"))
        assert finishes(await collect(runtime, spec()))
        assert finishes(await collect(runtime, spec(adapter="a")))
        values = {
            reading.label or reading.name: reading.value
            for reading in readings_of_demand(runtime.service.demand(), {"render": 2})
        }
        assert values["places_taken"] == values["places_waiting_for_adapters"] == 3
        assert values["places_total"] == 4
        assert values["room_waiting_adapters"] == 1
        assert values["room_wait_seconds"] > 0
        assert values["queue", "render"] == 2
        assert values["queue", "merge"] == values["queue", "grammar"] == 0
        await busy.end()
        assert all(map(finishes, await asyncio.gather(*cold)))
        assert runtime.service.demand().num_held_up == runtime.service.demand().first_waited_s == 0


def merge(density: float) -> Composition:
    return Composition.of(
        [Part("a"), Part("b")], merge=Merge(strategy=Strategy.TIES, density=density)
    )


async def test_sums_do_not_wait_for_merges_and_few_merges_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving_in(
        tmp_path, room=1, ranks=same_shapes(*"ab"), adapter_memory=2**22
    ) as runtime:
        go_on, terms = threading.Event(), runtime.saved.terms

        def slowly(composition: Composition, *args: Any) -> AdapterTerms:
            if composition.merge is not None:
                assert go_on.wait(60)
            return terms(composition, *args)

        monkeypatch.setattr(runtime.saved, "terms", slowly)
        wanted = [spec(adapter=merge(number / 10)) for number in range(1, 10)]
        merges = [asyncio.create_task(collect(runtime, one)) for one in wanted]
        try:
            readers = runtime.loader.readers
            await eventually(lambda: readers.num_merges_waiting == 8, "one is computed, 8 wait")
            with pytest.raises(QueueFull, match="8 merges of adapters wait to be computed"):
                await collect(runtime, spec(adapter=merge(0.95)))
            text = "a*0.7+b*0.3"
            assert finishes(await asyncio.wait_for(collect(runtime, spec(adapter=text)), 60))
            same = asyncio.create_task(collect(runtime, wanted[0]))  # it waits for the one there is
            await asyncio.sleep(0)
            assert not same.done()
        finally:
            go_on.set()
        assert all(map(finishes, await asyncio.gather(same, *merges)))
        assert readers.num_merges_waiting == 0


async def test_what_waits_to_be_read_is_counted_by_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "abcde"
    async with serving_in(
        tmp_path, room=1, ranks=same_shapes(*names), adapter_memory=2**22
    ) as runtime:
        go_on, terms = threading.Event(), runtime.saved.terms

        def slowly(*args: Any) -> AdapterTerms:
            assert go_on.wait(60)
            return terms(*args)

        monkeypatch.setattr(runtime.saved, "terms", slowly)
        texts = [*names, "a*0.5", "b*0.5"]  # two adapters are read at a time, and one sum
        asked = [asyncio.create_task(collect(runtime, spec(adapter=text))) for text in texts]
        queues = runtime.loader.readers.queues
        try:
            wanted = {"adapter": 3, "sum": 1, "merge": 0}
            await eventually(lambda: queues() == wanted, "what has no thread waits")
        finally:
            go_on.set()
        assert all(map(finishes, await asyncio.gather(*asked)))
        assert queues() == {"adapter": 0, "sum": 0, "merge": 0}


async def test_what_is_given_up_keeps_others_waiting_as_long_as_it_has_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving_in(
        tmp_path, room=1, ranks=same_shapes(*"ab"), adapter_memory=2**22
    ) as runtime:
        begun: list[str] = []
        go_on, terms = threading.Event(), runtime.saved.terms

        def slowly(composition: Composition, *args: Any) -> AdapterTerms:
            begun.append(str(composition))
            assert go_on.wait(60)
            return terms(composition, *args)

        monkeypatch.setattr(runtime.saved, "terms", slowly)

        def ask(wanted: str | Composition) -> asyncio.Task[Any]:
            return asyncio.create_task(collect(runtime, spec(adapter=wanted)))

        queues = runtime.loader.readers.queues
        given_up = [ask("a*0.5"), ask(merge(0.3))]
        try:
            await eventually(lambda: len(begun) == 2, "both have a thread")
            others = [ask("b*0.5"), ask(merge(0.5))]
            wanted = {"adapter": 0, "sum": 1, "merge": 1}
            await eventually(lambda: queues() == wanted, "the others wait")
            for one in given_up:
                one.cancel()
            await asyncio.wait(given_up)
            await eventually(lambda: queues() == wanted, "they wait for what goes on")
            assert len(begun) == 2
        finally:
            go_on.set()
        assert all(map(finishes, await asyncio.gather(*others)))
        assert not any(queues().values())


async def test_a_merge_that_waits_for_room_is_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving_in(
        tmp_path, room=1, ranks={"a": 8, "b": 8, "large": 48}, adapter_memory=2 * MERGED
    ) as runtime:
        terms, computed = runtime.saved.terms, Counter[str]()

        def count(composition: Composition, *args: Any) -> AdapterTerms:
            computed[str(composition)] += 1
            return terms(composition, *args)

        monkeypatch.setattr(runtime.saved, "terms", count)
        busy = await Holding(runtime, "large").begun()
        merged = asyncio.create_task(collect(runtime, spec(adapter=merge(0.5))))
        await eventually(lambda: runtime.loader.line.waited_s > 0, "it waits for room")
        await busy.end()
        assert finishes(await merged)
        assert computed[str(merge(0.5))] == 1


async def stopped(runtime: Runtime, tasks: list[asyncio.Task[Any]]) -> set[type[object]]:
    """What they are told when the server stops."""
    runtime.service.refuse()
    runtime.loader.close()
    with pytest.raises(NotReady):
        async with runtime.loader.hold("late"):
            pass
    found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
    return {type(one) for one in found}


async def test_a_stop_is_told_at_once_to_all_who_wait_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room_line, "PATIENCE_S", math.inf)
    async with serving_in(tmp_path, room=1, ranks=same_shapes(*"abcd", "late")) as runtime:
        busy = await Holding(runtime, "a").begun()
        waiting = [asyncio.create_task(collect(runtime, spec(adapter=name))) for name in "bccd"]
        line, reads = runtime.loader.line, runtime.loader.readers.stats
        await eventually(lambda: line.num_waiting == 3 and line.waited_s > 0, "they wait")
        before = reads.num_reads
        assert await stopped(runtime, waiting) == {NotReady}
        assert reads.num_reads == before
        await busy.end()


async def test_a_stop_is_told_at_once_to_all_whose_adapters_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have a thread, or wait for one, for a turn to merge, or for the load of another."""
    async with serving_in(
        tmp_path, room=1, ranks=same_shapes(*"abcde", "late"), adapter_memory=2**22
    ) as runtime:
        begun: list[str] = []
        go_on, terms = threading.Event(), runtime.saved.terms

        def slowly(composition: Composition, *args: Any) -> AdapterTerms:
            begun.append(str(composition))
            assert go_on.wait(60)
            return terms(composition, *args)

        monkeypatch.setattr(runtime.saved, "terms", slowly)
        wanted = [*"abcdea", "a*0.5", "b*0.5", merge(0.3), merge(0.5), merge(0.5)]
        waiting = [asyncio.create_task(collect(runtime, spec(adapter=one))) for one in wanted]
        try:
            await eventually(lambda: len(begun) == 4, "two adapters, a sum and a merge are read")
            queues = {"adapter": 3, "sum": 1, "merge": 1}
            await eventually(lambda: runtime.loader.readers.queues() == queues, "others wait")
            assert await stopped(runtime, waiting) == {NotReady}
            assert len(begun) == 4
        finally:
            go_on.set()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_merge_may_take_half_of_the_memory_for_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """With the layers beside its own, which have no delta, and the float32 copies for merging."""
    computed: list[str] = []
    merged_layer = compose._merged

    def note(deltas: Any, weights: Any, how: Merge, path: str) -> Any:
        computed.append(path)
        return merged_layer(deltas, weights, how, path)

    monkeypatch.setattr(compose, "_merged", note)
    most = MERGED if dtype == "float32" else MERGED + MERGED // 2
    options: dict[str, Any] = {"ranks": same_shapes(*"ab"), "dtype": dtype, "mode": "merged"}
    async with serving_in(tmp_path, room=1, adapter_memory=2 * most - 2, **options) as runtime:
        text = f"need {most} bytes on the device; a merge may take {most - 1}, half"
        with pytest.raises(AdapterCapacityError, match=text) as error:
            await collect(runtime, spec(adapter=merge(0.5)))
        assert "Use merge_strategy linear" in str(error.value.fix)
        assert not computed
    async with serving_in(tmp_path, room=1, adapter_memory=2 * most, **options) as runtime:
        assert finishes(await collect(runtime, spec(adapter=merge(0.5))))
        assert len(computed) == 2
