"""The only caller of the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from dynamic_lora_adapters.costs import KernelChooser
from dynamic_lora_adapters.layers import DeltaSite
from dynamic_lora_adapters.merge import Merger
from dynamic_lora_adapters.row_hooks import RowHooks
from dynamic_lora_server.engine.attention import AttentionStep, attending
from dynamic_lora_server.engine.batch import Batch
from dynamic_lora_server.engine.kv_cache import KVCache
from dynamic_lora_server.engine.paged_attention import (
    PagedKernel,
    PagedTables,
    paged_kernel_available,
)
from dynamic_lora_server.engine.probe import forward
from dynamic_lora_server.engine.scheduler import Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRunner:
    """Owns the model, the delta site and the KV tensors; runs one batch at a time.

    `paged` says that the KV space is paged; pages are read by torch's kernel
    where it can, else gathered.
    """

    model: PreTrainedModel
    site: DeltaSite
    hooks: RowHooks
    merger: Merger
    cache: KVCache
    chooser: KernelChooser
    paged: bool

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> tuple[Batch, torch.Tensor]:
        """Run the pieces; returns the batch and logits [num_sampled, vocab] in float32."""
        batch = Batch.build(pieces, self.model.device, self.merger.merged)
        self._write_given(pieces)
        self.site.plan = self.chooser.assign(batch.plan)
        self.site.head_plan = self.chooser.assign(batch.head_plan)
        self.site.segments = batch.segments
        self.hooks.prepare(batch.segments)
        step = AttentionStep(batch.spans, batch.cells, self.cache, self._paged_kernel(batch))
        try:
            with attending(step):
                logits = forward(self.model, batch.input_ids, batch.position_ids, batch.logit_rows)
        finally:
            self.site.plan = self.site.head_plan = None
            self.site.segments = ()
        return batch, logits

    def _write_given(self, pieces: Sequence[Piece]) -> None:
        """Put the keys and values that an adapter gives into the cache, before the first piece."""
        for piece in pieces:
            sequence = piece.sequence
            prompt = sequence.prompt_terms
            if prompt is None or not prompt.keys or sequence.num_computed != prompt.num_tokens:
                continue
            assert sequence.allocation is not None
            cells = torch.tensor(
                sequence.allocation.cells(0, prompt.num_tokens), device=self.model.device
            )
            for layer, (keys, values) in enumerate(zip(prompt.keys, prompt.values, strict=True)):
                self.cache.write(layer, cells, keys, values)

    def _paged_kernel(self, batch: Batch) -> PagedKernel | None:
        if not (self.paged and paged_kernel_available(self.model.device)):
            return None
        return PagedKernel(PagedTables.of(batch.spans, self.model.device))
