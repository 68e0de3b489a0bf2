"""Small tensors between host and device, without the host waiting for the device.

A copy from or to pageable memory waits until the device has done everything it was
given before. From and to pinned memory it is queued behind that, and torch keeps the
pinned memory until the copy is done.
"""

from collections.abc import Callable

import torch


def to_device(
    values: object, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A tensor of `values` (numbers in nested lists, or a tensor of the host) on `device`."""
    host = torch.as_tensor(values, dtype=dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a device's tensor that may be read once a `milestone` behind it was waited for.

    Of a tensor of the host it is the tensor itself.
    """
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def milestone(device: torch.device) -> Callable[[], None]:
    """What to call to wait until the device has done all that it was given up to now.

    It raises what the device's work raised.
    """
    if device.type == "cpu":
        return _at_once
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


def check_alive(device: torch.device) -> None:
    """Raise torch.AcceleratorError where an error has ended all work on the device.

    For those who try something out: CUDA says the same of that as of what only failed, and blames
    the next one for it.
    """
    if device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.synchronize(device)


def _at_once() -> None:
    """The host's own work is done when its call returns."""
