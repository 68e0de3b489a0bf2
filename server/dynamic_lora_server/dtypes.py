"""Which number format the weights are kept in."""

import time

import torch
from transformers import PreTrainedConfig

_ROWS = 32


def choose_dtype(wanted: str, device: torch.device, config: PreTrainedConfig) -> torch.dtype:
    """The dtype named, or for "auto" the best one here.

    On CUDA that is the checkpoint's own (bfloat16 if it is float32). On a CPU
    float32 and bfloat16 are timed on a product of the model's width, because
    bfloat16 is far slower on processors without matrix instructions for it.
    """
    if wanted != "auto":
        dtype = getattr(torch, wanted)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type == "cuda":
        own = config.dtype
        return own if own in (torch.bfloat16, torch.float16) else torch.bfloat16
    width = int(config.hidden_size)
    return min((torch.float32, torch.bfloat16), key=lambda dtype: _seconds(dtype, width))


def _seconds(dtype: torch.dtype, width: int) -> float:
    x, w = torch.randn(_ROWS, width).to(dtype), torch.randn(4 * width, width).to(dtype)
    samples = []
    for _ in range(5):
        begin = time.perf_counter()
        torch.nn.functional.linear(x, w)
        samples.append(time.perf_counter() - begin)
    return min(samples)
