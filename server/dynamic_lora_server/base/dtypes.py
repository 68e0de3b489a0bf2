"""Which number format the weights are kept in."""

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from dynamic_lora_adapters.apply.products import ProductKind, obstacle

_ROWS = 32
_SAMPLES = 15
# How many times as fast bfloat16 must be: float32 answers exactly.
_WORTH = 2.5


def choose_dtype(
    wanted: str, device: torch.device, config: PreTrainedConfig, *, native: bool = True
) -> torch.dtype:
    """The dtype named, or for "auto" the best one here.

    On CUDA that is the checkpoint's own (bfloat16 if it is float32). On a CPU it is
    float32 where products are in C++, which computes in nothing else (`native` says whether
    that is wanted): a step of it is faster than one of torch's operators in bfloat16 even
    with a matrix unit (AMX), and `--quantize bf16` makes use of such a unit. Without C++,
    float32 and bfloat16 are timed on a product of the model's width, and bfloat16 is taken
    where it is clearly faster; it is far slower on processors without instructions for it.
    """
    if wanted != "auto":
        return named_dtype(wanted)
    if device.type == "cuda":
        own = config.dtype
        return own if own in (torch.bfloat16, torch.float16) else torch.bfloat16
    if native and obstacle(ProductKind.NATIVE, torch.zeros(1, 1)) is None:
        return torch.float32
    exact, short = _seconds((torch.float32, torch.bfloat16), int(config.hidden_size))
    return torch.bfloat16 if short * _WORTH < exact else torch.float32


def named_dtype(name: str) -> torch.dtype:
    """torch's dtype of this name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _seconds(dtypes: Sequence[torch.dtype], width: int) -> list[float]:
    """The least of several products in each dtype, in turns: a disturbance meets them alike."""
    inputs = [(torch.randn(_ROWS, width), torch.randn(4 * width, width)) for _ in dtypes]
    pairs = [(x.to(d), w.to(d)) for (x, w), d in zip(inputs, dtypes, strict=True)]
    samples: list[list[float]] = [[] for _ in dtypes]
    for _ in range(_SAMPLES):
        for found, (x, w) in zip(samples, pairs, strict=True):
            begin = time.perf_counter()
            torch.nn.functional.linear(x, w)
            found.append(time.perf_counter() - begin)
    return [min(found) for found in samples]
