"""Memory on huge pages."""

import gc
import mmap
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamic_lora_adapters.arena import Arena

MIB = 2**20


@given(
    requests=st.lists(
        st.tuples(
            st.lists(st.integers(0, 40), min_size=1, max_size=3),
            st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.int64]),
        ),
        max_size=12,
    ),
    chunk_bytes=st.sampled_from([0, 1000, 4 * MIB]),
)
def test_tensors_lie_apart_and_begin_at_cache_lines(
    requests: list[tuple[list[int], torch.dtype]], chunk_bytes: int
) -> None:
    arena = Arena(chunk_bytes)
    tensors = [arena.empty(*sizes, dtype=dtype) for sizes, dtype in requests]
    for number, (tensor, (sizes, dtype)) in enumerate(zip(tensors, requests, strict=True)):
        assert tensor.shape == torch.Size(sizes)
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert not tensor.numel() or tensor.data_ptr() % 64 == 0
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))


def test_small_tensors_share_a_mapping_and_large_ones_have_their_own() -> None:
    arena = Arena(4 * MIB)
    first = arena.empty(100, dtype=torch.float32)
    large = arena.empty(5 * MIB, dtype=torch.int8)
    second = arena.empty(100, dtype=torch.float32)
    assert second.data_ptr() - first.data_ptr() == 448
    assert second.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    assert large.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()


def test_a_chunk_that_is_full_is_followed_by_another() -> None:
    arena = Arena(4 * MIB)
    tensors = [arena.empty(3 * MIB // 4, dtype=torch.int8) for _ in range(7)]
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert len(storages) == 2


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system")
def test_memory_begins_at_a_huge_page_and_goes_with_its_last_tensor() -> None:
    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE

    before = mapped()
    tensor = Arena().empty(256 * MIB, dtype=torch.int8)
    assert tensor.data_ptr() % (2 * MIB) == 0
    part = tensor[:10]
    del tensor
    gc.collect()
    assert mapped() - before > 200 * MIB
    part.fill_(1)
    del part
    gc.collect()
    assert mapped() - before < 50 * MIB


def test_a_system_without_huge_pages_gives_ordinary_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    tensor = Arena().empty(3 * MIB, dtype=torch.float32)
    assert tensor.fill_(2).sum() == 6 * MIB


def test_a_kernel_that_refuses_huge_pages_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1, raising=False)
    tensor = Arena().empty(3 * MIB, dtype=torch.float32)
    assert tensor.fill_(2).sum() == 6 * MIB


def test_no_room_is_an_error_that_says_how_much_was_wanted() -> None:
    with pytest.raises(MemoryError, match=r"no room for a mapping of \d+ bytes"):
        Arena().empty(2**50, 8, dtype=torch.float32)


def test_threads_do_not_get_the_same_memory() -> None:
    arena = Arena(4 * MIB)
    taken: list[int] = []

    def take() -> None:
        taken.extend(arena.empty(16, dtype=torch.float32).data_ptr() for _ in range(200))

    tensors = arena.empty(16, dtype=torch.float32)
    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(taken)) == 800
    assert tensors.data_ptr() not in taken
