"""Host memory on huge pages, for weights and caches, of which a step reads long runs.

On pages of 4 KiB a step of hundreds of megabytes looks up a hundred thousand of
them, and a processor's own prefetching stops at each one's end. Linux gives larger
pages where it is asked to (`madvise(2)`, MADV_HUGEPAGE); where there are none, the
memory is as any other.
"""

import math
import mmap
import threading
from contextlib import suppress

import torch

HUGE_PAGE_BYTES = 2 * 2**20
_CHUNK = 32 * 2**20
_LINE = 64


class Arena:
    """Hands out tensors from mappings of `chunk_bytes`, one behind the other.

    A mapping lives as long as any tensor in it. What the current one has no room for
    has a mapping of its own if it is larger than a quarter of a chunk, else the next
    chunk begins with it. Safe to call from any thread.
    """

    def __init__(self, chunk_bytes: int = _CHUNK) -> None:
        self._chunk_bytes = chunk_bytes
        self._lock = threading.Lock()
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, *sizes: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor whose memory begins at a cache line and is not committed before it is written.

        Raises MemoryError if the system has no such room.
        """
        num_bytes = math.prod(sizes) * dtype.itemsize
        place = self._place(-(-num_bytes // _LINE) * _LINE)
        return place[:num_bytes].view(dtype).view(sizes)

    def _place(self, num_bytes: int) -> torch.Tensor:
        with self._lock:
            if self._used + num_bytes > len(self._chunk):
                if num_bytes > self._chunk_bytes // 4:
                    return _mapping(num_bytes)
                self._chunk, self._used = _mapping(self._chunk_bytes), 0
            start, self._used = self._used, self._used + num_bytes
            return self._chunk[start : self._used]


def _mapping(num_bytes: int) -> torch.Tensor:
    """Bytes [num_bytes], from a huge page's beginning on if they fill one."""
    if num_bytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    try:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=private)
    except OSError as error:
        raise MemoryError(f"no room for a mapping of {num_bytes} bytes: {error}") from error
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE_BYTES
    return whole[start : start + num_bytes]
