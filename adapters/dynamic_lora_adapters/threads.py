"""Keeps torch on side threads from slowing the engine's thread down.

The threads of an OpenMP team spin between two parallel regions, which makes
the hundreds of small products of a decoding step cheap. GNU's runtime lets
them spin only while all teams of the process together have no more threads
than there are processors. One parallel operation on a second thread, such as
converting an uploaded tensor, gives that thread a team of its own, and as long
as it lives every team sleeps and wakes instead: a decoding step of 32 rows
took 285 ms in place of 200, on 2 cores.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run torch's operations on the calling thread alone; also a decorator."""
    import torch  # not at the top: the registry does without it until it reads weights

    # Asked first, because torch sets a new thread's count when it first needs it.
    torch.get_num_threads()
    with _controller().limit(limits=1, user_api="openmp"):
        yield


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()
