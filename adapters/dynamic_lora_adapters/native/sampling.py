"""What sampling does in C++ where it can: peaks of the logits, and random draws."""

import logging
from dataclasses import dataclass

import torch

from dynamic_lora_adapters.native.draws import NativeDraws
from dynamic_lora_adapters.native.library import NativeUnavailable
from dynamic_lora_adapters.native.peaks import NativePeaks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NativeSampling:
    """Both, for logits that it `serves`."""

    peaks: NativePeaks
    draws: NativeDraws

    @staticmethod
    def serves(logits: torch.Tensor) -> bool:
        """Whether it can read logits [rows, vocab] of this kind."""
        return logits.device.type == "cpu" and logits.dtype == torch.float32


def native_sampling(*, wanted: bool = True) -> NativeSampling | None:
    """`NativeSampling`, or None where it is not wanted or cannot be had; the log says why not."""
    if not wanted:
        return None
    try:
        return NativeSampling(NativePeaks(), NativeDraws())
    except NativeUnavailable as reason:
        logger.info("Sampling is torch's: %s", reason)
        return None
