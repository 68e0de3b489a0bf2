"""A decoding step that start-up times."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from dynamic_lora_server.engine.attention.packed import AttentionStep
from dynamic_lora_server.engine.decoder.native_decoder import NativeDecoder
from dynamic_lora_server.engine.kv.cache import KVCache
from dynamic_lora_server.engine.probe import packed_spans


def decode_trial(
    model: PreTrainedModel, cache: KVCache, decoder: NativeDecoder
) -> Callable[[int], torch.Tensor]:
    """A step of so many sequences of one new token and nothing before it, to be timed.

    Where layers run in C++ it writes to the cache, which must not be in use.
    """

    @torch.inference_mode()
    def run(num_rows: int) -> torch.Tensor:
        ids = torch.zeros(1, num_rows, dtype=torch.long, device=model.device)
        step = AttentionStep(packed_spans((1,) * num_rows))
        if decoder.num_layers and num_rows <= len(cache.keys[0]):
            step.cells, step.cache, step.native = torch.arange(num_rows), cache, decoder.attention
        return decoder.logits(step, ids, torch.zeros_like(ids), 0)

    return run
