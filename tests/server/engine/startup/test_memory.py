"""What may be taken of the machine's memory, in and out of containers."""

from pathlib import Path

import psutil
import pytest
import torch

from dynamic_lora_server.engine.startup import memory
from tests.support.files import write_files

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file system of a machine that limits nobody."""
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    return tmp_path


def version_2(most: str, *, used: int = 300, cache: int = 100) -> dict[str, str]:
    """The files of a group, in MiB."""
    return {
        "memory.max": most,
        "memory.current": str(used * MIB),
        "memory.stat": f"anon 5\ninactive_file {cache * MIB}\nactive_file 7",
    }


def test_file_cache_counts_as_free() -> None:
    """What the system would give up at once: more than nobody uses."""
    available = psutil.virtual_memory().available
    assert memory.free_memory(CPU) == pytest.approx(available, rel=0.2)
    assert memory.share_of_free(CPU, 0.25) == pytest.approx(available / 4, rel=0.2)


def test_a_container_has_what_its_limit_leaves(root: Path) -> None:
    files = version_2(str(1000 * MIB))
    write_files(root, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    write_files(root, {"proc/self/cgroup": "0::/"})
    assert memory.free_memory(CPU) == 800 * MIB


def test_of_groups_within_groups_the_narrowest_counts(root: Path) -> None:
    write_files(root, {"proc/self/cgroup": "0::/system/unit"})
    for folder, most in (("", "max"), ("system", str(500 * MIB)), ("system/unit", "max")):
        files = version_2(most)
        write_files(root, {f"sys/fs/cgroup/{folder}/{name}": text for name, text in files.items()})
    assert memory.free_memory(CPU) == 300 * MIB


def test_limits_of_version_1(root: Path) -> None:
    write_files(root, {"proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/docker/abc"})
    write_files(
        root,
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(600 * MIB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(900 * MIB),
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {350 * MIB}",
        },
    )
    assert memory.free_memory(CPU) == 50 * MIB


def test_a_limit_that_is_used_up_leaves_nothing(root: Path) -> None:
    files = version_2(str(100 * MIB), used=400, cache=0)
    write_files(root, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert memory.free_memory(CPU) == 0


def test_what_torch_keeps_on_a_gpu_for_later_counts_as_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = [300 * MIB]
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000 * MIB - sum(kept), 2000 * MIB))
    assert memory.free_memory(torch.device("cuda")) == 1000 * MIB
