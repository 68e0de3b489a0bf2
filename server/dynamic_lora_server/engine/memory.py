"""Memory that is free on a device."""

import os

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that nobody uses."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def share_of_free(device: torch.device, share: float) -> int:
    """So large a share of it, in bytes."""
    return int(free_memory(device) * share)
