"""Decoder layers in C++ in the place of transformers', where both give the same logits.

transformers' code stays the definition: a model is taken over only if it and its
layers have the parts and sizes of Llama's, and if its logits are the same with and
without, over a KV cache, in several pieces, at the first positions and at the last.
Steps that hold more than low-rank terms run through transformers' own model. Of the
model's modules only embedding, rotary embedding, last norm and head are called by C++'s
steps: hooks on others do not act.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import PreTrainedModel

from dynamic_lora_adapters.apply.layers import DeltaSite, GroupedProjection
from dynamic_lora_adapters.apply.widening import model_dtype
from dynamic_lora_adapters.native import NativeUnavailable
from dynamic_lora_adapters.native.attention import NativeAttention
from dynamic_lora_adapters.native.head import Highest, NativeHead
from dynamic_lora_adapters.native.layer import (
    DeltaRuns,
    LayerStack,
    LayerStep,
    NativeLayer,
    delta_runs,
)
from dynamic_lora_adapters.native.norm import NativeRmsNorm
from dynamic_lora_adapters.native.product import Int8Product, NativeProduct, whole_inputs
from dynamic_lora_adapters.segments import DeltaPlan
from dynamic_lora_server.engine.attention.packed import (
    CACHED_BYTES,
    AttentionStep,
    Rule,
    attending,
)
from dynamic_lora_server.engine.decoder.decoder_probe import PROBE_CELLS, DecoderProbe
from dynamic_lora_server.engine.decoder.llama_layers import (
    LlamaFrame,
    Unsuited,
    has_llama_layers,
    layer_parts,
    layer_paths,
    llama_frame,
)
from dynamic_lora_server.engine.decoder.rotary import RotaryTables, Rotation, context_window
from dynamic_lora_server.engine.kv.cache import KVCache
from dynamic_lora_server.engine.probe import forward

logger = logging.getLogger(__name__)

# Largest logit difference, relative to the largest logit: what the order of sums makes.
_TOLERANCE = 1e-4
# Where inputs are rounded to sixteen bits (those of W8A8 are, while inputs are whole), a difference
# in float32's last place may become one of 2^-15 of the largest input, in every layer; over
# SmolLM2's thirty that makes 4e-4.
_ROUNDED_TOLERANCE = 2e-3
# Where keys and values are, one of 2^-8 of a value; that makes 2.4e-3.
_SHORTENED_TOLERANCE = 2e-2


@dataclass(frozen=True, slots=True)
class _Layer:
    native: NativeLayer
    rule: Rule

    @property
    def kind(self) -> tuple[int | None, int, int]:
        """What layers that share a `LayerStep` have in common: window, head width, KV heads."""
        return self.rule.window, self.native.parts.dim, self.native.parts.kv_heads


@dataclass(frozen=True, slots=True)
class _Running:
    """A step whose layers run in C++: what all of them share, and what those of one kind do."""

    attention: AttentionStep
    runs: DeltaRuns
    rotation: Rotation
    steps: dict[tuple[int | None, int, int], tuple[LayerStep, bool]] = field(default_factory=dict)

    def layer_step(self, number: int, layer: _Layer) -> tuple[LayerStep, bool]:
        """What the layer reads, and whether all tokens are among its items."""
        kind = layer.kind
        if kind not in self.steps:
            cells, cache = self.attention.cells, self.attention.cache
            assert cells is not None and cache is not None
            tables = cache.keys[number], cache.values[number]
            items, others = self.attention.native_items(layer.rule, *tables)
            alone = not others and all(span.num_new == 1 for span in self.attention.spans)
            step = LayerStep(cells, items, self.runs, alone=alone)
            by = self.rotation
            step.rotate_by(by.cos, by.sin, by.places, layer.native.parts.dim)
            self.steps[kind] = step, not others
        return self.steps[kind]


@dataclass(frozen=True, slots=True)
class _Head:
    projection: GroupedProjection
    native: NativeHead


class NativeDecoder:
    """Computes a model's logits, with its decoder layers in C++ where a step allows it.

    `attention` is there wherever C++ is, whether or not there are such layers.
    """

    def __init__(
        self, model: PreTrainedModel, site: DeltaSite, attention: NativeAttention | None = None
    ) -> None:
        self.attention = attention
        self._model = model
        self._site = site
        self._frame: LlamaFrame | None = None
        self._tables: RotaryTables | None = None
        self._layers: list[_Layer] = []
        self._stacks: dict[int, LayerStack] = {}
        self._head: _Head | None = None

    @property
    def num_layers(self) -> int:
        """How many layers were taken over: all of the model's, or none."""
        return len(self._layers)

    def logits(
        self,
        step: AttentionStep,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logit_rows: torch.Tensor | int,
    ) -> torch.Tensor:
        """Logits [rows, vocab] in float32 of one packed row of tokens [1, num_tokens].

        `logit_rows` are the tokens that are wanted, ascending; 0 is all of them.
        """
        hidden = self._hidden(step, input_ids, position_ids)
        if hidden is None:
            return self._by_transformers(step, input_ids, position_ids, logit_rows)
        return self._logits_of(hidden, logit_rows)

    def highest(
        self,
        step: AttentionStep,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logit_rows: torch.Tensor,
        *,
        with_logprobs: bool = False,
    ) -> torch.Tensor | Highest:
        """The same, or where the logits of each row are highest: what takes less time.

        `with_logprobs` asks for the log-probabilities of those as well.
        """
        hidden = self._hidden(step, input_ids, position_ids)
        if hidden is None:
            return self._by_transformers(step, input_ids, position_ids, logit_rows)
        if self._head is None or not self._head.projection.is_plain:
            return self._logits_of(hidden, logit_rows)
        return self._head.native(hidden, logit_rows, with_logprobs=with_logprobs)

    def _by_transformers(
        self,
        step: AttentionStep,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logit_rows: torch.Tensor | int,
    ) -> torch.Tensor:
        step.before_compute()
        with attending(step):
            return forward(self._model, input_ids, position_ids, logit_rows)

    def _hidden(
        self, step: AttentionStep, input_ids: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor | None:
        """What the layers make of the tokens, [1, num_tokens, width]; None if not in C++."""
        frame, tables = self._frame, self._tables
        runs = None if frame is None else self._delta_runs(step)
        if frame is None or tables is None or runs is None:
            return None
        hidden: torch.Tensor = frame.embed(input_ids)
        rotation = tables.rotation(hidden, position_ids)
        return self._through_layers(_Running(step, runs, rotation), hidden)

    def _logits_of(self, hidden: torch.Tensor, logit_rows: torch.Tensor | int) -> torch.Tensor:
        assert self._frame is not None
        # Where all rows are wanted they are so in their order.
        if isinstance(logit_rows, torch.Tensor) and len(logit_rows) < hidden.shape[1]:
            hidden = hidden.index_select(1, logit_rows)
        logits: torch.Tensor = self._frame.head(self._frame.norm(hidden))
        return logits[0].float()

    def _delta_runs(self, step: AttentionStep) -> DeltaRuns | None:
        """The step's terms for C++; None if that has no code for all of them."""
        site = self._site
        if step.cells is None or any(s.terms.overrides for s in site.segments):
            return None
        return delta_runs(DeltaPlan(()) if site.plan is None else site.plan)

    def _through_layers(self, running: _Running, hidden: torch.Tensor) -> torch.Tensor:
        number = 0
        while number < len(self._layers):
            layer = self._layers[number]
            step, complete = running.layer_step(number, layer)
            if number == 0:
                running.attention.before_compute()
            if complete:
                stack = self._stacks[number]
                hidden = stack.run(step, hidden)
                number += stack.num_layers
                continue
            q, attended = layer.native.attend(step, hidden)
            running.attention.attend_others(number, q, attended, layer.rule)
            hidden = layer.native.finish(step, hidden, attended)
            number += 1
        return hidden

    def take_over(
        self,
        frame: LlamaFrame,
        layers: Sequence[tuple[NativeLayer, Rule]],
        head: _Head | None = None,
    ) -> None:
        """Let these answer for the model's layers, and a head for the highest logits.

        Neighbours of one window and of equal widths run in one call.
        """
        self._frame, self._head = frame, head
        window = context_window(self._model.config)
        like = torch.zeros(1, dtype=model_dtype(self._model), device=self._model.device)
        self._tables = RotaryTables(frame.rotary, window, like)
        self._layers = [_Layer(*layer) for layer in layers]
        kinds = [(layer.native.widths, layer.kind) for layer in self._layers]
        starts = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
        for start, stop in zip(starts, [*starts[1:], len(kinds)], strict=True):
            natives = [layer.native for layer in self._layers[start:stop]]
            self._stacks[start] = LayerStack(natives)

    def give_back(self) -> None:
        """Let transformers' layers run again."""
        self._frame = self._tables = self._head = None
        self._layers.clear()
        self._stacks.clear()


@torch.inference_mode()
def adopt_native_layers(
    model: PreTrainedModel,
    site: DeltaSite,
    projections: Sequence[GroupedProjection],
    cache: KVCache,
    *,
    wanted: bool = True,
) -> NativeDecoder:
    """Take over all decoder layers of a model that is suited, or none; the log says why not.

    Nothing runs in C++ unless it is `wanted`, nor on a GPU. `site` and `projections` are what
    `inject` returned. Writes to the cache, which must not be in use yet.
    """
    if not wanted or model.device.type != "cpu":
        return NativeDecoder(model, site)
    try:
        attention = NativeAttention()
    except NativeUnavailable as reason:
        logger.info("Attention is torch's: %s", reason)
        return NativeDecoder(model, site)
    decoder = NativeDecoder(model, site, attention)
    try:
        with whole_inputs():
            _take_over(model, decoder, projections, cache)
    except (NativeUnavailable, Unsuited) as reason:
        logger.info("Decoder layers are transformers' own: %s", reason)
        decoder.give_back()
    except Exception:  # a model that is called in another way than Llama's is served all the same
        logger.warning("Decoder layers are transformers' own", exc_info=True)
        decoder.give_back()
    return decoder


def _take_over(
    model: PreTrainedModel,
    decoder: NativeDecoder,
    projections: Sequence[GroupedProjection],
    cache: KVCache,
) -> None:
    assert decoder.attention is not None
    if not has_llama_layers(model):
        raise Unsuited("not all of them have the parts of a Llama layer")
    serves = partial(decoder.attention.serves, model_dtype(model))
    if not all(map(serves, cache.keys, cache.values)):
        keys, dtype = cache.keys[0], model_dtype(model)
        raise Unsuited(
            f"attention is not in C++ for {dtype} on {keys.device}, heads of {keys.shape[2]}"
        )
    if any(
        keys.shape != values.shape for keys, values in zip(cache.keys, cache.values, strict=True)
    ):
        raise Unsuited("keys and values differ in size")
    rounded = any(isinstance(p.base, Int8Product) for p in projections)
    tolerance = _ROUNDED_TOLERANCE if rounded else _TOLERANCE
    if cache.keys[0].dtype != model_dtype(model):
        # What may be taken over shows best where nothing is rounded in between.
        whole = cache.similar(num_cells=PROBE_CELLS, dtype=model_dtype(model))
        _take_over_on(whole, model, decoder, projections, tolerance)
        decoder.give_back()
        tolerance = _SHORTENED_TOLERANCE
    _take_over_on(cache, model, decoder, projections, tolerance)


def _take_over_on(
    cache: KVCache,
    model: PreTrainedModel,
    decoder: NativeDecoder,
    projections: Sequence[GroupedProjection],
    tolerance: float,
) -> None:
    frame = llama_frame(model)
    assert decoder.attention is not None
    probe = DecoderProbe(model, cache, decoder.attention)
    expected = probe.run(decoder.logits)
    layers: list[tuple[NativeLayer, Rule]] = []
    for number, path in enumerate(layer_paths(model)):
        rule = probe.rules[number]
        keys, values = cache.keys[number], cache.values[number]
        parts = layer_parts(model, path, projections, rule, keys)
        layers.append((NativeLayer(parts, keys, values), rule))
    decoder.take_over(frame, layers, _head(frame, projections))
    for cached_bytes in (CACHED_BYTES, 0):  # all in one call, and layer by layer
        error = probe.run(decoder.logits, cached_bytes) - expected
        relative = float(error.abs().max() / expected.abs().max())
        if not relative <= tolerance:
            raise Unsuited(f"their logits differ by {relative:.1e}")


def _head(frame: LlamaFrame, projections: Sequence[GroupedProjection]) -> _Head | None:
    """What finds the highest logits in C++; None where norm or head are not in C++."""
    norm = frame.norm.forward
    projection = next((p for p in projections if p.group.is_head), None)
    if projection is None or not isinstance(norm, NativeRmsNorm):
        return None
    if not isinstance(projection.base, NativeProduct):
        return None
    return _Head(projection, NativeHead(norm, projection.base))
