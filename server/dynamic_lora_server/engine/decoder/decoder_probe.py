"""Two random sequences by which decoder layers in C++ are compared with the model's own."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from dynamic_lora_adapters.native.attention import NativeAttention
from dynamic_lora_server.engine.attention.packed import CACHED_BYTES, AttentionStep, Rule
from dynamic_lora_server.engine.batch import Span
from dynamic_lora_server.engine.decoder.llama_layers import Unsuited
from dynamic_lora_server.engine.kv.cache import KVCache
from dynamic_lora_server.engine.probe import random_tokens

# A long sequence whose prompt comes in two pieces, the first of more than
# attention.FEW_TOKENS, and a short one.
_PIECES = ((20, 3), (1, 4))
# What they take of a KV cache.
PROBE_CELLS = sum(map(sum, _PIECES))

Logits = Callable[[AttentionStep, torch.Tensor, torch.Tensor, torch.Tensor | int], torch.Tensor]


class DecoderProbe:
    """Feeds the sequences to a model in pieces, as a server would.

    Raises Unsuited if the cache is too small for them.
    """

    def __init__(self, model: PreTrainedModel, cache: KVCache, attention: NativeAttention) -> None:
        self._cache = cache
        self._attention = attention
        self.rules: dict[int, Rule] = {}
        # Whatever depends on the position beside the rotary tables shows at the window's end.
        window = int(model.config.max_position_embeddings)
        self._offsets = [max(window - sum(_PIECES[0]), 0), 0]
        if len(cache.keys[0]) < PROBE_CELLS:
            raise Unsuited("the KV cache is too small for a probe")
        self._ids = random_tokens(model, PROBE_CELLS).split([sum(pieces) for pieces in _PIECES])

    def run(self, logits_of: Logits, cached_bytes: int = CACHED_BYTES) -> torch.Tensor:
        """What `logits_of` gives for all tokens, [num_tokens, vocab].

        `rules` then holds how layers attend. With no `cached_bytes` the long piece is left to
        torch's attention.
        """
        begun = [0] * len(self._ids)
        logits = []
        for lengths in zip(*_PIECES, strict=True):
            spans, row, start = [], 0, 0
            for ids, cached, new in zip(self._ids, begun, lengths, strict=True):
                spans.append(Span(row, new, cached, (start,), len(ids)))
                row, start = row + new, start + len(ids)
            logits.append(self._step(spans, logits_of, cached_bytes))
            begun = [cached + new for cached, new in zip(begun, lengths, strict=True)]
        return torch.cat(logits)

    def _step(self, spans: Sequence[Span], logits_of: Logits, cached_bytes: int) -> torch.Tensor:
        cached = torch.cat([torch.arange(s.num_cached, s.num_total) for s in spans])
        offsets = torch.cat(
            [torch.full((s.num_new,), o) for o, s in zip(self._offsets, spans, strict=True)]
        )
        starts = torch.cat([torch.full((s.num_new,), s.starts[0]) for s in spans])
        tokens = [ids[s.num_cached : s.num_total] for ids, s in zip(self._ids, spans, strict=True)]
        step = AttentionStep(
            spans, cached + starts, self._cache, None, self._attention, cached_bytes
        )
        logits = logits_of(step, torch.cat(tokens)[None], (cached + offsets)[None], 0)
        self.rules = self.rules or step.rules
        return logits
