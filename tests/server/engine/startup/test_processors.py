"""How many threads compute, in and out of containers."""

from pathlib import Path

import pytest

from dynamic_lora_server.engine.startup import processors
from tests.support.files import write_files


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file system of a machine that limits nobody."""
    monkeypatch.setattr(processors, "_ROOT", tmp_path)
    return tmp_path


def test_without_a_limit_all_are_used() -> None:
    assert processors.within_quota(64) == 64


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("max 100000", 64),
        ("200000 100000", 2),
        ("250000 100000", 2),  # three would be stopped for a sixth of the time
        ("50000 100000", 1),
        ("9000000 100000", 64),
    ],
)
def test_a_containers_share(root: Path, limit: str, expected: int) -> None:
    write_files(root, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": limit})
    assert processors.within_quota(64) == expected


def test_of_groups_within_groups_the_narrowest_counts(root: Path) -> None:
    write_files(root, {"proc/self/cgroup": "0::/system/unit"})
    for folder, limit in (("system", "300000 100000"), ("system/unit", "400000 100000")):
        write_files(root, {f"sys/fs/cgroup/{folder}/cpu.max": limit})
    assert processors.within_quota(64) == 3


@pytest.mark.parametrize(("quota", "expected"), [("-1", 64), ("400000", 4)])
def test_limits_of_version_1(root: Path, quota: str, expected: int) -> None:
    write_files(root, {"proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/docker/abc"})
    folder = "sys/fs/cgroup/cpu"
    write_files(
        root, {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000"}
    )
    assert processors.within_quota(64) == expected
