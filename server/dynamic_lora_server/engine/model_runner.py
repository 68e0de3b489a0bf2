"""The only caller of the model."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import overload

import torch
from transformers import PreTrainedModel

from dynamic_lora_adapters.apply.costs import KernelChooser
from dynamic_lora_adapters.apply.layers import DeltaSite
from dynamic_lora_adapters.apply.merge import Merger
from dynamic_lora_adapters.apply.row_hooks import RowHooks
from dynamic_lora_adapters.apply.widening import model_dtype
from dynamic_lora_adapters.native.head import Highest
from dynamic_lora_adapters.segments import slot_order
from dynamic_lora_adapters.transfer import to_device
from dynamic_lora_server.engine.attention.packed import AttentionStep
from dynamic_lora_server.engine.attention.paged import (
    PagedKernel,
    PagedTables,
    paged_kernel_available,
)
from dynamic_lora_server.engine.batch import Batch
from dynamic_lora_server.engine.decoder.native_decoder import NativeDecoder
from dynamic_lora_server.engine.graphs.decode_graphs import DecodeGraphs
from dynamic_lora_server.engine.kv.cache import KVCache
from dynamic_lora_server.engine.sampling.unread import UnreadTokens
from dynamic_lora_server.engine.scheduler import Piece
from dynamic_lora_server.engine.sequence import Sequence
from dynamic_lora_server.noop import noop


@dataclass(frozen=True, slots=True)
class GreedyOnly:
    """Only where logits are highest is wanted; `with_logprobs`, how likely that is, too."""

    with_logprobs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRunner:
    """Owns the model, the delta site and the KV tensors; runs one batch at a time.

    `paged` says that the KV space is paged; pages are read by torch's kernel
    where it can, else gathered. `decoder` runs in C++ what can be. Steps that
    `graphs` take are left to them.
    """

    model: PreTrainedModel
    site: DeltaSite
    hooks: RowHooks
    merger: Merger
    cache: KVCache
    chooser: KernelChooser
    paged: bool
    decoder: NativeDecoder
    graphs: DecodeGraphs | None = None

    @overload
    def run(
        self, pieces: Seq[Piece], unread: UnreadTokens | None = None
    ) -> tuple[Seq[Piece], torch.Tensor]: ...

    @overload
    def run(
        self,
        pieces: Seq[Piece],
        unread: UnreadTokens | None = None,
        *,
        greedy_only: GreedyOnly | None,
        before_compute: Callable[[], object] = noop,
    ) -> tuple[Seq[Piece], torch.Tensor | Highest]: ...

    @torch.inference_mode()
    def run(
        self,
        pieces: Seq[Piece],
        unread: UnreadTokens | None = None,
        *,
        greedy_only: GreedyOnly | None = None,
        before_compute: Callable[[], object] = noop,
    ) -> tuple[Seq[Piece], torch.Tensor | Highest]:
        """Run the pieces; on CUDA, start to.

        `unread` has the tokens of sequences whose last one is not read yet. Returns the
        pieces that score and their logits [num_scored, vocab] in float32, which the
        next step may overwrite. `greedy_only` is there if all of these take their highest
        logit: where that is known without logits, it is returned in their place.
        `before_compute`: see `Engine.step`.
        """
        for piece in pieces:
            if piece.sequence.adapter is not None:
                piece.sequence.adapter.await_upload()
        if self.graphs is not None:
            merged = self.merger.merged
            ordered = sorted(pieces, key=lambda piece: slot_order(piece.sequence.adapter, merged))
            logits = self.graphs.run(ordered, merged, unread)
            if logits is not None:
                return ordered, logits
        return self._run_packed(
            pieces, unread, greedy_only=greedy_only, before_compute=before_compute
        )

    def lasts(self, sequence: Sequence) -> bool:
        """Whether keys and values that are computed for a sequence now are as good in any step.

        Not where the weights hold somebody else's adapter and are rounded: taking it away from
        the sequence's rows leaves what the rounding was.
        """
        merged = self.merger.merged
        return merged is None or sequence.adapter is merged or not self.merger.rounds

    def _run_packed(
        self,
        pieces: Seq[Piece],
        unread: UnreadTokens | None,
        *,
        greedy_only: GreedyOnly | None,
        before_compute: Callable[[], object],
    ) -> tuple[Seq[Piece], torch.Tensor | Highest]:
        batch = Batch.build(pieces, self.cache.device, self.merger.merged, unread)
        self._write_given(pieces)
        self.site.plan = self.chooser.assign(batch.plan)
        self.site.head_plan = self.chooser.assign(batch.head_plan)
        self.site.segments = batch.segments
        self.hooks.prepare(batch.segments)
        step = AttentionStep(
            batch.spans,
            batch.cells,
            self.cache,
            self._paged_kernel(batch),
            self.decoder.attention,
            before_compute=before_compute,
        )
        try:
            inputs = step, batch.input_ids, batch.position_ids, batch.logit_rows
            found: torch.Tensor | Highest
            if greedy_only is None:
                found = self.decoder.logits(*inputs)
            else:
                found = self.decoder.highest(*inputs, with_logprobs=greedy_only.with_logprobs)
        finally:
            self.site.plan = self.site.head_plan = None
            self.site.segments = ()
        return batch.scored, found

    def _write_given(self, pieces: Seq[Piece]) -> None:
        """Put the keys and values that an adapter gives into the cache, before the first piece."""
        for piece in pieces:
            sequence = piece.sequence
            prompt = sequence.prompt_terms
            if prompt is None or not prompt.keys or sequence.num_computed != prompt.num_tokens:
                continue
            assert sequence.allocation is not None
            cells = to_device(sequence.allocation.cells(0, prompt.num_tokens), self.cache.device)
            for layer, (keys, values) in enumerate(zip(prompt.keys, prompt.values, strict=True)):
                self.cache.write(layer, cells, keys, values)

    @property
    def head_dim(self) -> int:
        """The largest width of a cached head."""
        return max(keys.shape[-1] for keys in self.cache.keys)

    def _paged_kernel(self, batch: Batch) -> PagedKernel | None:
        # The kernel takes no float32.
        if not self.paged or model_dtype(self.model) not in (torch.float16, torch.bfloat16):
            return None
        if not paged_kernel_available(self.cache.device, self.head_dim):
            return None
        return PagedKernel(PagedTables.of(batch.spans, self.cache.device))
