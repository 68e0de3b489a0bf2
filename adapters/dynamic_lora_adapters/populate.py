"""Commits host memory ahead of its first use.

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

_POPULATE_WRITE = 23


def populate(tensors: Sequence[torch.Tensor]) -> int:
    """Commit the memory that tensors on the host cover; the number of bytes that were asked for.

    Others may read and write them meanwhile. 0 where the system cannot.
    """
    if not sys.platform.startswith("linux"):
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    total = 0
    for tensor in tensors:
        start, num_bytes = _pages(tensor)
        if num_bytes and madvise(start, num_bytes, _POPULATE_WRITE) != 0:
            return total  # an older kernel, or no memory left: nothing that anybody has to know
        total += num_bytes
    return total


def populate_soon(find: Callable[[], Sequence[torch.Tensor]], *, delay_s: float = 0.3) -> None:
    """The same in the background, when what led to it has had its time of the processor.

    What is wanted then is asked for then: nothing, where it has gone meanwhile.
    """
    timer = threading.Timer(delay_s, lambda: populate(find()))
    timer.daemon = True
    with suppress(RuntimeError):  # no more threads, or the process ends
        timer.start()


def _pages(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and length of the pages that hold a tensor, gaps between its rows included."""
    if not tensor.numel():
        return 0, 0
    reach = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    start = tensor.data_ptr()
    stop = start + reach * tensor.itemsize
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    return first, -(-stop // mmap.PAGESIZE) * mmap.PAGESIZE - first
