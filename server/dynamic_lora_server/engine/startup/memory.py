"""Memory that may be taken on a device."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from dynamic_lora_server.engine.startup.control_groups import group_folders

_ROOT = Path("/")
# Of control groups, versions 2 and 1: the limit, what is used, and which of that is file cache
# that nobody reads at the moment.
_LIMITS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory(device: torch.device) -> int:
    """Bytes that can be had without swapping, within the limits of a container if there are any."""
    if device.type == "cuda":
        # What torch keeps for its next tensors counts as taken to CUDA.
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return min([psutil.virtual_memory().available, *_left_of_limits(_ROOT)])


def share_of_free(device: torch.device, share: float) -> int:
    """So large a share of it, in bytes."""
    return int(free_memory(device) * share)


def _left_of_limits(root: Path) -> Iterator[int]:
    """What each control group that this process is in, or one around it, has left (Linux)."""
    for controller, limit, used, cache in _LIMITS:
        for folder in group_folders(root, controller):
            try:
                most = int((folder / limit).read_text())  # "max": no limit
                taken = int((folder / used).read_text())
                kept = (folder / "memory.stat").read_text().split()
            except (OSError, ValueError):
                continue
            idle = int(kept[kept.index(cache) + 1]) if cache in kept else 0
            yield max(most - taken + idle, 0)
