import asyncio
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dynamic_lora_adapters.compositions import compose
from dynamic_lora_adapters.compositions.composition import (
    Composition,
    Merge,
    Part,
    Strategy,
    VersionNotFound,
)
from dynamic_lora_adapters.device.upload import HostUpload, Places, Sources
from dynamic_lora_adapters.errors import AdapterCapacityError, AdapterError, StoreFailed
from dynamic_lora_adapters.home.lease import Lease
from dynamic_lora_adapters.kernels.factor_layout import spread_width
from dynamic_lora_adapters.terms import AdapterTerms
from dynamic_lora_server.answers.streams import begin_all, collect_all
from dynamic_lora_server.engine.scheduler import Scheduler
from dynamic_lora_server.errors import EngineFailed, NotReady
from dynamic_lora_server.generation import Started
from dynamic_lora_server.runtime import Runtime
from dynamic_lora_server.serving import room_line
from tests.support.adapters import make_adapter
from tests.support.eventually import eventually
from tests.support.models import tiny_llama
from tests.support.runtimes import collect, finishes, publish, serving, spec, token_ids
from tests.support.slabs import hold_writes


def names(count: int) -> list[str]:
    return [f"task-{i}" for i in range(count)]


async def all_freed(runtime: Runtime) -> None:
    """Wait until no adapter has memory; what is merged is taken away on the engine's thread."""
    await eventually(lambda: not runtime.stats().adapters.used_bytes, "no adapter has memory")


async def none_leased(runtime: Runtime) -> None:
    """Wait until no request holds an adapter."""
    await eventually(lambda: not runtime.stats().adapters.num_leased, "no adapter is leased")


async def test_more_adapters_than_room_are_served_in_turn(tmp_path: Path) -> None:
    folders = [
        make_adapter(tmp_path / name, tiny_llama(), rank=8, targets=["q_proj"], seed=i)
        for i, name in enumerate(names(5))
    ]
    room_for_two = 2 * 2 * 8 * (64 + spread_width(128, 4)) * 4
    async with serving(tmp_path, adapter_memory=room_for_two) as runtime:
        for name, folder in zip(names(5), folders, strict=True):
            publish(runtime, name, folder)
        alone = [token_ids(await collect(runtime, spec(adapter=name))) for name in names(5)]
        requests = [spec(adapter=name) for name in names(5) * 3]
        together = await asyncio.gather(*(collect(runtime, r) for r in requests))
        assert [token_ids(events) for events in together] == alone * 3
        stats = runtime.stats().adapters
        assert stats.num_resident == 2
        assert stats.num_evictions >= 3


async def test_one_load_serves_all_who_wait_for_it(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", tiny_llama())
    async with serving(tmp_path) as runtime:
        publish(runtime, "a", folder)
        done = await asyncio.gather(*(collect(runtime, spec(adapter="a")) for _ in range(6)))
        assert all(finishes(events) for events in done)
        stats = runtime.stats()
        assert stats.adapters.num_loads == stats.reads.num_reads == 1
        assert stats.reads.seconds > 0


async def test_a_refused_load_refuses_all_who_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody else: who comes later may find things mended."""
    folder = make_adapter(tmp_path / "a", tiny_llama())
    async with serving(tmp_path) as runtime:
        for name in ("a", "twin"):
            publish(runtime, name, folder)
        terms, go_on, read = runtime.saved.terms, threading.Event(), list[str]()

        def refuse(composition: Composition, *_: Any) -> AdapterTerms:
            read.append(str(composition))
            assert go_on.wait(60)
            raise StoreFailed(f"the files of {composition} cannot be read")

        monkeypatch.setattr(runtime.saved, "terms", refuse)
        wanted = ["a", "a", "twin", "a", "twin"]
        waiting = [asyncio.create_task(collect(runtime, spec(adapter=name))) for name in wanted]
        held_up = runtime.service.places
        await eventually(lambda: held_up.num_held_up == len(wanted), "all wait for the load")
        go_on.set()
        refused = await asyncio.gather(*waiting, return_exceptions=True)
        assert [str(one) for one in refused] == [
            f"the files of {name} cannot be read" for name in wanted
        ]
        assert sorted(read) == ["a", "twin"]
        monkeypatch.setattr(runtime.saved, "terms", terms)
        assert finishes(await collect(runtime, spec(adapter="a")))


async def test_who_found_no_room_joins_a_load_that_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for_one = 2 * 8 * (64 + spread_width(128, 4)) * 4
    async with serving(tmp_path, adapter_memory=room_for_one) as runtime:
        for i, name in enumerate("ab"):
            path = make_adapter(tmp_path / name, tiny_llama(), targets=["q_proj"], seed=i)
            publish(runtime, name, path)
        load, go_on, reads = runtime.registry.load, threading.Event(), Counter[str]()

        def read(digest: str) -> AdapterTerms:
            reads[digest] += 1
            if reads[digest] == 2:
                assert go_on.wait(10)
            return load(digest)

        monkeypatch.setattr(runtime.registry, "load", read)
        wanted = runtime.registry.resolve("b").digest
        async with runtime.loader.hold("a"):
            both = [asyncio.create_task(collect(runtime, spec(adapter="b"))) for _ in range(2)]
            await eventually(lambda: reads[wanted] == 2, "the second reads")
        # The first has been told of the room, while the second is reading.
        await asyncio.sleep(0.3)
        assert reads[wanted] == 2
        go_on.set()
        assert all(map(finishes, await asyncio.gather(*both)))
        assert reads[wanted] == 2


async def test_a_busy_adapter_makes_room_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that overlap never let their adapter go by themselves; and nobody reads in vain."""
    monkeypatch.setattr(room_line, "PATIENCE_S", 0.3)
    room_for_one = 2 * 8 * (64 + spread_width(128, 4)) * 4
    async with serving(tmp_path, adapter_memory=room_for_one) as runtime:
        for i, name in enumerate(["hot", "cold-1", "cold-2"]):
            path = make_adapter(tmp_path / name, tiny_llama(), targets=["q_proj"], seed=i)
            publish(runtime, name, path)

        enough = asyncio.Event()

        async def keep_busy(after_s: float) -> None:
            await asyncio.sleep(after_s)
            while not enough.is_set():
                async with runtime.loader.hold("hot"):
                    await asyncio.sleep(0.06)

        busy = [asyncio.create_task(keep_busy(0.02 * number)) for number in range(3)]
        await asyncio.sleep(0.1)
        cold = [collect(runtime, spec(adapter=name)) for name in ("cold-1", "cold-2") * 2]
        answers = await asyncio.wait_for(asyncio.gather(*cold), 20)
        assert all(map(finishes, answers))
        enough.set()
        await asyncio.gather(*busy)
        # One try of each before there is a line, one for whose turn it is, and what came again.
        assert runtime.stats().reads.num_reads <= 20


async def test_prompts_of_one_request_do_not_wait_for_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is served before there is room for the second, behind another adapter's."""
    monkeypatch.setattr(room_line, "PATIENCE_S", 0.0)
    room_for_one = 2 * 8 * (64 + spread_width(128, 4)) * 4
    async with serving(tmp_path, adapter_memory=room_for_one, max_waiting=64) as runtime:
        for seed, name in enumerate(names(3)):
            source = make_adapter(
                tmp_path / name, tiny_llama(), rank=8, targets=["q_proj"], seed=seed
            )
            publish(runtime, name, source)

        async def ask(name: str) -> int:
            wanted = [runtime.service.stream(spec(adapter=name)) for _ in range(3)]
            return len(await collect_all(await begin_all(wanted)))

        asked = asyncio.gather(*(ask(name) for name in names(3) * 3))
        assert await asyncio.wait_for(asked, 60) == [3] * 9
        assert runtime.stats().adapters.num_evictions >= 2


async def test_who_waits_for_room_is_told_that_the_engine_broke(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for_one = 2 * 8 * (64 + spread_width(128, 4)) * 4
    async with serving(tmp_path, adapter_memory=room_for_one, mode="merged") as runtime:
        for seed, name in enumerate(names(2)):
            source = make_adapter(
                tmp_path / name, tiny_llama(), rank=8, targets=["q_proj"], seed=seed
            )
            publish(runtime, name, source)
        first, second = names(2)
        await collect(runtime, spec(adapter=first))
        await none_leased(runtime)
        assert runtime.stats().modes.merged is not None  # and keeps its slot

        def broken(*_: object) -> None:
            raise RuntimeError("the books do not balance")

        monkeypatch.setattr(Scheduler, "schedule", broken)
        with pytest.raises(EngineFailed, match="the books do not balance"):
            await collect(runtime, spec())
        with pytest.raises(EngineFailed, match="the books do not balance"):
            async with asyncio.timeout(60), runtime.loader.hold(second):
                pass
        assert isinstance(await runtime.service.until_broken(), EngineFailed)


async def test_who_waits_for_room_is_told_that_the_server_shuts_down(tmp_path: Path) -> None:
    """Also where the room comes of what was failed for that."""
    room_for_one = 2 * 8 * (64 + spread_width(128, 4)) * 4
    async with serving(tmp_path, adapter_memory=room_for_one, mode="bypass") as runtime:
        for seed, name in enumerate(names(2)):
            source = make_adapter(
                tmp_path / name, tiny_llama(), rank=8, targets=["q_proj"], seed=seed
            )
            publish(runtime, name, source)
        first, second = names(2)
        stream = runtime.service.stream(spec(adapter=first, max_new_tokens=400))
        await anext(stream)
        waiting = asyncio.create_task(collect(runtime, spec(adapter=second)))
        await eventually(lambda: runtime.loader.readers.stats.num_reads >= 2, "the second is read")
        runtime.service.refuse()
        await asyncio.to_thread(runtime.service.close)
        with pytest.raises(NotReady, match="shutting down"):
            await asyncio.wait_for(waiting, 60)
        with pytest.raises(NotReady, match="shutting down"):
            async for _ in stream:
                pass
        await none_leased(runtime)


async def test_an_adapter_larger_than_all_room_is_refused(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "big", tiny_llama(), rank=32, targets="all-linear")
    async with serving(tmp_path, adapter_memory=4096) as runtime:
        publish(runtime, "big", folder)
        with pytest.raises(AdapterCapacityError, match="adapters may use 4096 in all") as refused:
            await collect(runtime, spec(adapter="big"))
        assert refused.value.fix == "Start the server with a larger --adapter-memory."
        assert finishes(await collect(runtime, spec()))


async def test_a_request_cancelled_while_it_loads_leaves_no_lease(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", tiny_llama(), targets="all-linear")
    async with serving(tmp_path) as runtime:
        publish(runtime, "a", folder)
        for pause in (0.0, 0.0005, 0.002, 0.005, 0.01, 0.02):
            task = asyncio.create_task(collect(runtime, spec(adapter="a", max_new_tokens=300)))
            await asyncio.sleep(pause)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            runtime.loader.forget(runtime.registry.resolve("a").digest)
        await none_leased(runtime)


async def test_a_request_cancelled_as_its_adapter_is_deleted_removes_no_files_on_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter(tmp_path / "a", tiny_llama())
    threads: list[threading.Thread] = []
    async with serving(tmp_path) as runtime:
        publish(runtime, "a", folder)
        lease, collect_files = runtime.registry.lease, runtime.registry.collect

        def lease_and_delete(name: str) -> Lease:
            leased = lease(name)
            runtime.registry.delete(name)
            loop.call_soon_threadsafe(task.cancel)
            time.sleep(0.1)
            return leased

        def note_thread(digest: str) -> None:
            threads.append(threading.current_thread())
            collect_files(digest)

        monkeypatch.setattr(runtime.registry, "lease", lease_and_delete)
        monkeypatch.setattr(runtime.registry, "collect", note_thread)
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(collect(runtime, spec(adapter="a")))
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: threads, "its files are removed")
        await all_freed(runtime)
    assert threading.current_thread() not in threads


async def test_a_request_does_not_wait_for_the_files_of_what_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, collected = threading.Event(), threading.Event()
    async with serving(tmp_path) as runtime:
        publish(runtime, "a", make_adapter(tmp_path / "a", tiny_llama()))
        collect_files = runtime.registry.collect

        def slowly(digest: str) -> None:
            assert go_on.wait(30)
            collect_files(digest)
            collected.set()

        monkeypatch.setattr(runtime.registry, "collect", slowly)
        async with asyncio.timeout(60):
            async with runtime.loader.hold("a"):
                runtime.registry.delete("a")
        go_on.set()
        assert await asyncio.to_thread(collected.wait, 30)
        await all_freed(runtime)


async def test_the_files_of_what_was_deleted_hold_up_no_adapter_that_is_brought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is busy, or a database that does not answer, has threads of nobody else."""
    go_on, collecting = threading.Event(), threading.Event()
    async with serving(tmp_path) as runtime:
        for seed, name in enumerate("abc"):
            publish(runtime, name, make_adapter(tmp_path / name, tiny_llama(), seed=seed))
        collect_files = runtime.registry.collect

        def slowly(digest: str) -> None:
            collecting.set()
            assert go_on.wait(60)
            collect_files(digest)

        monkeypatch.setattr(runtime.registry, "collect", slowly)
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        for name in "ab":
            async with runtime.loader.hold(name):
                runtime.registry.delete(name)
        assert collecting.wait(60)
        try:
            assert finishes(await asyncio.wait_for(collect(runtime, spec(adapter="c")), 30))
        finally:
            go_on.set()
        await eventually(lambda: runtime.stats().adapters.num_resident == 1, "both have gone")


async def test_an_adapter_on_the_device_is_held_and_let_go_without_a_thread(
    tmp_path: Path,
) -> None:
    folder = make_adapter(tmp_path / "a", tiny_llama())
    go_on = threading.Event()
    async with serving(tmp_path) as runtime:
        publish(runtime, "a", folder)
        await collect(runtime, spec(adapter="a"))
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        busy = asyncio.create_task(asyncio.to_thread(go_on.wait, 60))
        try:
            async with asyncio.timeout(60), runtime.loader.hold("a") as held:
                assert held is not None
        finally:
            go_on.set()
            await busy


async def test_compositions_that_are_computed_hold_up_no_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    async with serving(tmp_path) as runtime:
        for seed, name in enumerate(names(2)):
            publish(runtime, name, make_adapter(tmp_path / name, tiny_llama(), seed=seed))
        terms, alone = runtime.saved.terms, names(2)[0]

        def slowly(composition: Composition, *args: Any) -> AdapterTerms:
            if composition.plain is None:
                assert go_on.wait(60)
            return terms(composition, *args)

        monkeypatch.setattr(runtime.saved, "terms", slowly)
        texts = [f"{alone}*0.{number}" for number in range(1, 4)]
        waiting = [asyncio.create_task(collect(runtime, spec(adapter=text))) for text in texts]
        await asyncio.sleep(0.1)
        try:
            assert finishes(await asyncio.wait_for(collect(runtime, spec(adapter=alone)), 30))
        finally:
            go_on.set()
        assert all(map(finishes, await asyncio.gather(*waiting)))


async def test_a_merge_that_nobody_waits_for_ends_with_the_layer_that_it_is_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computing, go_on, computed = threading.Event(), threading.Event(), Counter[float]()
    merge_layer = compose._merged

    def merged(density: float) -> Composition:
        how = Merge(strategy=Strategy.TIES, density=density)
        return Composition.of([Part(name) for name in names(2)], merge=how)

    def slowly(deltas: Any, weights: Any, how: Merge, path: str) -> Any:
        computed[how.density] += 1
        computing.set()
        assert go_on.wait(60)
        return merge_layer(deltas, weights, how, path)

    async with serving(tmp_path) as runtime:
        for seed, name in enumerate(names(2)):
            publish(runtime, name, make_adapter(tmp_path / name, tiny_llama(), seed=seed))
        monkeypatch.setattr(compose, "_merged", slowly)
        request = asyncio.create_task(collect(runtime, spec(adapter=merged(0.5))))
        assert await asyncio.to_thread(computing.wait, 60)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        go_on.set()
        # Its thread is free for the next one.
        assert finishes(await asyncio.wait_for(collect(runtime, spec(adapter=merged(0.25))), 60))
        assert computed[0.5] == 1


async def test_a_merge_larger_than_all_room_is_refused_before_it_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*_: object) -> None:
        raise AssertionError("it was computed")

    async with serving(tmp_path, adapter_memory=30_000) as runtime:
        for seed, name in enumerate(names(2)):
            folder = make_adapter(tmp_path / name, tiny_llama(), targets=["q_proj"], seed=seed)
            publish(runtime, name, folder)
        merged = Composition.of(
            [Part(name) for name in names(2)], merge=Merge(strategy=Strategy.TIES, density=0.5)
        )
        monkeypatch.setattr(compose, "_merged", computed)
        with pytest.raises(AdapterCapacityError, match="merged deltas need 65536 bytes"):
            await collect(runtime, spec(adapter=merged))


async def test_a_composition_is_loaded_once_and_leaves_with_a_part(tmp_path: Path) -> None:
    folders = {
        name: make_adapter(tmp_path / name, tiny_llama(), rank=i + 2, seed=i)
        for i, name in enumerate(("a", "b"))
    }
    async with serving(tmp_path) as runtime:
        for name, folder in folders.items():
            publish(runtime, name, folder)
        done = await asyncio.gather(
            *(collect(runtime, spec(adapter=text)) for text in ("a*0.5-b*2", "-b*2+a*.5") * 3)
        )
        assert len({tuple(token_ids(events)) for events in done}) == 1
        assert runtime.stats().adapters.num_loads == 1
        started = done[0][0]
        assert isinstance(started, Started)
        assert (started.adapter, started.name) == ("a*0.5-b*2", None)
        assert runtime.built.pool.resident_digests() == [started.version]
        await collect(runtime, spec(adapter="b"))
        runtime.loader.forget(runtime.registry.resolve("a").digest)
        assert runtime.built.pool.resident_digests() == [runtime.registry.resolve("b").digest]


async def test_the_same_content_under_another_name_is_the_same_memory(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", tiny_llama())
    async with serving(tmp_path) as runtime:
        publish(runtime, "a", folder)
        publish(runtime, "twin", folder)
        for text in ("a*0.5", "twin*0.5", "a*0.5+twin*0", "a", "twin*1"):
            await collect(runtime, spec(adapter=text))
        assert runtime.stats().adapters.num_loads == 2


async def test_a_refused_composition_leaves_no_lease(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", tiny_llama())
    async with serving(tmp_path) as runtime:
        digest = publish(runtime, "a", folder)
        for text in ("a*0.5+b", "a@00000000", "a*"):
            with pytest.raises(AdapterError):
                await collect(runtime, spec(adapter=text))
        moved = Composition.of([Part("a", "0" * 8), Part("a")])
        with pytest.raises(VersionNotFound, match="'a' has no version '00000000'"):
            await collect(runtime, spec(adapter=moved))
        assert runtime.stats().adapters.num_loads == 0
        runtime.registry.delete("a")
        assert digest not in {path.name for path in (tmp_path / "home").rglob("*")}
        base = await collect(runtime, spec(adapter=Composition()))
        assert token_ids(base) == token_ids(await collect(runtime, spec()))


async def test_a_deletion_during_the_load_frees_the_memory_after_the_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter(tmp_path / "a", tiny_llama())
    async with serving(tmp_path) as runtime:
        digest = publish(runtime, "a", folder)
        load = runtime.registry.load

        def delete_meanwhile(digest: str) -> AdapterTerms:
            terms = load(digest)
            runtime.registry.delete("a")
            runtime.loader.forget(digest)
            return terms

        monkeypatch.setattr(runtime.registry, "load", delete_meanwhile)
        assert finishes(await collect(runtime, spec(adapter="a")))
        assert digest not in runtime.built.pool.resident_digests()
        await all_freed(runtime)


async def test_replaced_content_leaves_the_device(tmp_path: Path) -> None:
    folders = [make_adapter(tmp_path / str(i), tiny_llama(), seed=i) for i in range(2)]
    async with serving(tmp_path) as runtime:
        publish(runtime, "a", folders[0])
        await collect(runtime, spec(adapter="a"))
        newer = publish(runtime, "a", folders[1])
        assert runtime.built.pool.resident_digests() == []
        await collect(runtime, spec(adapter="a"))
        assert runtime.built.pool.resident_digests() == [newer]


async def test_a_deletion_while_it_is_copied_frees_the_memory_after_the_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [make_adapter(tmp_path / str(i), tiny_llama(), seed=i) for i in range(2)]
    async with serving(tmp_path) as runtime:
        for name, folder in zip("ab", folders, strict=True):
            publish(runtime, name, folder)
        write = HostUpload.write

        def delete_meanwhile(self: HostUpload, sources: Sources, places: Places) -> None:
            write(self, sources, places)
            monkeypatch.undo()
            digest = runtime.registry.resolve("a").digest
            runtime.registry.delete("a")
            runtime.loader.forget(digest)

        monkeypatch.setattr(HostUpload, "write", delete_meanwhile)
        assert finishes(await collect(runtime, spec(adapter="a*0.5+b")))
        await all_freed(runtime)


async def test_who_waits_for_the_room_of_a_cancelled_load_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter(tmp_path / "a", tiny_llama(), rank=8, targets=["q_proj"])
    room_for_one = 2 * 8 * (64 + spread_width(128, 4)) * 4
    async with serving(tmp_path, adapter_memory=room_for_one) as runtime:
        publish(runtime, "a", folder)
        writing, go_on = hold_writes(monkeypatch)
        first = asyncio.create_task(collect(runtime, spec(adapter="a")))
        assert await asyncio.to_thread(writing.wait, 10)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        second = asyncio.create_task(collect(runtime, spec(adapter="a")))
        await asyncio.sleep(0.2)
        assert not second.done()
        go_on.set()
        assert finishes(await asyncio.wait_for(second, 60))
