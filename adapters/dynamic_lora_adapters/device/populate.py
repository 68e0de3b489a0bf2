"""Commits host memory ahead of its first use, and gives back what is not used any more.

A page that was never written costs its first writer a fault, and on a virtual machine
one of the host's too: as much, for a whole adapter, as joining and copying it.
Linux can be asked to take the faults earlier (`madvise(2)`, MADV_POPULATE_WRITE, since
5.14), without touching what is there. Elsewhere the first writer pays, as ever.
"""

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

_DONT_NEED = 4
_POPULATE_WRITE = 23


def populate(tensors: Sequence[torch.Tensor]) -> int:
    """Commit the memory that tensors on the host cover; the number of bytes that were asked for.

    Others may read and write them meanwhile. 0 where the system cannot.
    """
    return _advise([_pages(tensor) for tensor in tensors], _POPULATE_WRITE)


def release(tensors: Sequence[torch.Tensor]) -> int:
    """Give back the pages that nothing but these tensors lies on; the number of bytes.

    Their content is lost, gaps between rows included. 0 where the system cannot.
    """
    return _advise([_inner_pages(tensor) for tensor in tensors], _DONT_NEED)


def _advise(ranges: Sequence[tuple[int, int]], advice: int) -> int:
    if not sys.platform.startswith("linux"):
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    total = 0
    for start, num_bytes in ranges:
        if num_bytes > 0 and madvise(start, num_bytes, advice) != 0:
            return total  # an older kernel, or no memory left: nothing that anybody has to know
        total += max(num_bytes, 0)
    return total


def populate_soon(
    find: Callable[[], Sequence[torch.Tensor]],
    *,
    given_up: Callable[[], bool] = lambda: False,
    delay_s: float = 0.3,
) -> None:
    """The same in the background, when what led to it has had its time of the processor.

    What is wanted then is asked for then: nothing, where it has gone meanwhile. What was `given_up`
    for good while it was being committed is given back.
    """

    def work() -> None:
        tensors = find()
        populate(tensors)
        if given_up():
            release(tensors)

    timer = threading.Timer(delay_s, work)
    timer.daemon = True
    with suppress(RuntimeError):  # no more threads, or the process ends
        timer.start()


def _pages(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and length of the pages that hold a tensor, gaps between its rows included."""
    start, stop = _reach(tensor)
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    return first, -(-stop // mmap.PAGESIZE) * mmap.PAGESIZE - first


def _inner_pages(tensor: torch.Tensor) -> tuple[int, int]:
    """The same of the pages that lie within; the length is below 0 where there are none."""
    start, stop = _reach(tensor)
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    return first, stop // mmap.PAGESIZE * mmap.PAGESIZE - first


def _reach(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a tensor begins and ends in memory."""
    if not tensor.numel():
        return 0, 0
    reach = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.itemsize
