"""How many threads can compute at a time, within a container's share of the processors."""

from collections.abc import Iterator
from pathlib import Path

from dynamic_lora_server.engine.startup.control_groups import group_folders

_ROOT = Path("/")


def within_quota(num_threads: int) -> int:
    """So many threads, or fewer where control groups give less time than that of so many.

    Threads beyond it are stopped together in the middle of a step, for the rest of each period.
    """
    return max(1, min([num_threads, *map(int, _quotas(_ROOT))]))


def _quotas(root: Path) -> Iterator[float]:
    """Processors' worth of time of each control group that has a limit."""
    for folder in group_folders(root, ""):
        yield from _ratio(folder / "cpu.max")
    for folder in group_folders(root, "cpu"):
        yield from _ratio(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")


def _ratio(*files: Path) -> Iterator[float]:
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        if int(quota) > 0:  # "max" and -1: no limit
            yield int(quota) / int(period)
    except (OSError, ValueError):
        return
