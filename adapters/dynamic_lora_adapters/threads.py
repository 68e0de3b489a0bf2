"""Keeps the threads that compute from being in each other's way, and in that of other processes.

The threads of an OpenMP team spin between two parallel regions, which makes
the hundreds of small products of a decoding step cheap. GNU's runtime lets
them spin only while all teams of the process together have no more threads
than there are processors. One parallel operation on a second thread, such as
converting an uploaded tensor, gives that thread a team of its own, and as long
as it lives every team sleeps and wakes instead: a decoding step of 32 rows
took 285 ms in place of 200, on 2 cores.

How long threads spin is GNU's runtime's to say, when it is loaded: 6 ms on one processor of 2.4
GHz. Where another process computes too, a thread waits for a processor while the other spins on
its own, in every region anew.
"""

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController

# 0.3 ms where a look takes 29 ns. With 4,000, torch's operators lose a tenth on idle processors.
_LOOKS = "10000"
_SET_BY_USERS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def spin_briefly(environment: MutableMapping[str, str]) -> None:
    """Have OpenMP's threads sleep soon when they wait, in processes of this environment.

    Only before a process has loaded torch. What the user has set stays.
    """
    if not any(name in environment for name in _SET_BY_USERS):
        environment["GOMP_SPINCOUNT"] = _LOOKS


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
