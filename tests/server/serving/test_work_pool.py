"""Threads with a line before them: how long it may be, and what is left of who gives up."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator
from functools import partial

import pytest

from dynamic_lora_server.errors import QueueFull
from dynamic_lora_server.serving.work_pool import WorkPool


class Body:
    """What a piece of work keeps in memory."""


@pytest.fixture
async def go_on() -> AsyncIterator[threading.Event]:
    """Work that waits for it ends with the test at the latest."""
    event = threading.Event()
    yield event
    event.set()


async def begun(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 10)


async def test_work_is_done_and_its_errors_are_told() -> None:
    pool = WorkPool("test", num_threads=1, max_waiting=0)

    def fail() -> None:
        raise ValueError("no text")

    assert await pool.run(lambda: threading.current_thread().name.startswith("test"))
    with pytest.raises(ValueError, match="no text"):
        await pool.run(fail)
    assert await pool.run(lambda: 3) == 3


async def test_a_line_that_is_full_refuses_with_a_pause(go_on: threading.Event) -> None:
    pool = WorkPool("test", num_threads=2, max_waiting=3)
    tasks = [asyncio.create_task(pool.run(lambda: go_on.wait(10))) for _ in range(5)]
    await asyncio.sleep(0.01)
    with pytest.raises(QueueFull, match="3 texts wait for their turn") as refused:
        await pool.run(lambda: None)
    assert 1 <= refused.value.retry_after <= 60
    go_on.set()
    assert await asyncio.gather(*tasks) == [True] * 5
    assert await pool.run(lambda: 3) == 3


async def test_who_gives_up_in_the_line_leaves_nothing_behind(go_on: threading.Event) -> None:
    pool = WorkPool("test", num_threads=1, max_waiting=1)
    running = asyncio.create_task(pool.run(lambda: go_on.wait(10)))
    body = Body()
    gone = weakref.ref(body)
    waiting = asyncio.create_task(pool.run(partial(id, body)))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait({waiting})
    del body, waiting
    gc.collect()
    assert gone() is None
    go_on.set()
    assert await running


async def test_work_that_nobody_waits_for_keeps_its_thread_to_its_end(
    go_on: threading.Event,
) -> None:
    pool = WorkPool("test", num_threads=1, max_waiting=1)
    working = threading.Event()

    def work() -> None:
        working.set()
        go_on.wait(10)

    given_up = asyncio.create_task(pool.run(work))
    await begun(working)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    next_one = asyncio.create_task(pool.run(lambda: 3))
    await asyncio.sleep(0.01)
    with pytest.raises(QueueFull):
        await pool.run(lambda: None)
    go_on.set()
    assert await next_one == 3


async def test_a_line_without_an_end_refuses_nobody(go_on: threading.Event) -> None:
    pool = WorkPool("test", num_threads=1, max_waiting=None)
    tasks = [asyncio.create_task(pool.run(lambda: go_on.wait(10))) for _ in range(100)]
    await asyncio.sleep(0.01)
    go_on.set()
    assert await asyncio.gather(*tasks) == [True] * 100


async def test_a_thread_that_cannot_be_started_fails_its_own_work_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, done = WorkPool("test", num_threads=1, max_waiting=0), list[int]()

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for number in range(2):
            with pytest.raises(RuntimeError, match="new thread"):
                await pool.run(partial(done.append, number))
    await asyncio.wait_for(pool.run(partial(done.append, 2)), 60)
    assert done == [2]
