"""A few threads for work that takes long, and a line before them that may have an end."""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import stack_size
from typing import TypeVar

from dynamic_lora_server.errors import QueueFull
from dynamic_lora_server.serving.pace import Pace

T = TypeVar("T")


class WorkPool:
    """Runs one piece of work on each thread, while others wait. Lives on one event loop.

    Where `max_waiting` is None the line has no end; `what` names those who wait in it. Who gives
    up while it waits leaves nothing behind; work that has begun keeps its thread to its end,
    whether or not anybody waits for it. The threads' stacks have `stack_bytes` where threads
    usually have too few.
    """

    def __init__(
        self,
        name: str,
        *,
        num_threads: int,
        max_waiting: int | None,
        what: str = "texts",
        stack_bytes: int | None = None,
    ) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._what = what
        self._stack_bytes = stack_bytes
        self._num_threads = num_threads
        self._max_waiting = max_waiting
        self._num_waiting = 0
        # The executor's own queue would keep what is given up, with the body that it came in.
        self._free = asyncio.Semaphore(num_threads)
        self._pace = Pace()

    @property
    def num_waiting(self) -> int:
        """How many wait for a thread."""
        return self._num_waiting

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns. Raises QueueFull where too many wait, and what `work` raises.

        RuntimeError where the system has no thread to give.
        """
        await self._thread()
        loop = asyncio.get_running_loop()
        began = time.monotonic()

        def free(_: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._free.release)

        to_do = [work]
        try:
            with _stacks_of(self._stack_bytes):
                future = self._executor.submit(_do, to_do)  # which may start a thread
        except BaseException:
            to_do.clear()  # the executor keeps what it has found no thread for
            self._free.release()
            raise
        future.add_done_callback(free)
        found = await asyncio.wrap_future(future)
        self._pace.record(time.monotonic() - began)
        return found

    def close(self) -> None:
        """Begin no more work, and let the threads end."""
        self._executor.shutdown(wait=False)

    async def _thread(self) -> None:
        """Wait until one is free; it is taken then."""
        full = self._max_waiting is not None and self._num_waiting >= self._max_waiting
        if full and self._free.locked():
            raise QueueFull(
                f"{self._num_waiting} {self._what} wait for their turn; the server takes no more.",
                retry_after=self._pace.retry_after(self._num_waiting / self._num_threads),
            )
        self._num_waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._num_waiting -= 1


def _do(work: list[Callable[[], T]]) -> T:
    return work[0]()


@contextmanager
def _stacks_of(num_bytes: int | None) -> Iterator[None]:
    """The size of the stacks of threads that are started meanwhile."""
    if num_bytes is None:
        yield
        return
    usual = stack_size(num_bytes)
    try:
        yield
    finally:
        stack_size(usual)
