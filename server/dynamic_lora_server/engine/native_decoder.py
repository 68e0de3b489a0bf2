"""Decoder layers in C++ in the place of transformers', where both give the same logits.

transformers' code stays the definition: a model is taken over only if it and its
layers have the parts and sizes of Llama's, and if its logits are the same with and
without, over a KV cache, in several pieces, at the first positions and at the last.
Steps that hold more than low-rank terms run through transformers' own model. Of the
model's modules only embedding, rotary embedding, last norm and head are called by C++'s
steps: hooks on others do not act.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import PreTrainedModel

from dynamic_lora_adapters.layers import DeltaSite, GroupedProjection
from dynamic_lora_adapters.native import NativeUnavailable
from dynamic_lora_adapters.native.attention import NativeAttention
from dynamic_lora_adapters.native.layer import (
    DeltaRuns,
    LayerStack,
    LayerStep,
    NativeLayer,
    delta_runs,
)
from dynamic_lora_adapters.native.product import Int8Product, whole_inputs
from dynamic_lora_adapters.segments import DeltaPlan
from dynamic_lora_server.engine.attention import (
    CACHED_BYTES,
    AttentionStep,
    Rule,
    attending,
)
from dynamic_lora_server.engine.batch import Span
from dynamic_lora_server.engine.kv_cache import KVCache
from dynamic_lora_server.engine.llama_layers import (
    LlamaFrame,
    Unsuited,
    has_llama_layers,
    layer_parts,
    layer_paths,
    llama_frame,
)
from dynamic_lora_server.engine.probe import forward, packed_spans
from dynamic_lora_server.engine.rotary import RotaryTables, Rotation, context_window

logger = logging.getLogger(__name__)

# Largest logit difference, relative to the largest logit: what the order of sums makes.
_TOLERANCE = 1e-4
# Where inputs are rounded to sixteen bits, a difference in float32's last place may become one
# of 2^-15 of the largest input, in every layer; over SmolLM2's thirty that makes 4e-4.
_ROUNDED_TOLERANCE = 2e-3
# Where keys and values are, one of 2^-8 of a value; that makes 2.4e-3.
_SHORTENED_TOLERANCE = 2e-2
# The probe's sequences: a long one whose prompt comes in two pieces, the first of more than
# attention.FEW_TOKENS, and a short one.
_PROBE_PIECES = ((20, 3), (1, 4))
_PROBE_CELLS = sum(map(sum, _PROBE_PIECES))


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
            step = LayerStep(cells, items, self.runs)
            by = self.rotation
            step.rotate_by(by.cos, by.sin, by.places, layer.native.parts.dim)
            self.steps[kind] = step, not others
        return self.steps[kind]


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
        frame, tables = self._frame, self._tables
        runs = None if frame is None else self._delta_runs(step)
        if frame is None or tables is None or runs is None:
            with attending(step):
                return forward(self._model, input_ids, position_ids, logit_rows)
        hidden: torch.Tensor = frame.embed(input_ids)
        rotation = tables.rotation(hidden, position_ids)
        hidden = self._through_layers(_Running(step, runs, rotation), hidden)
        # Where all rows are wanted they are so in their order.
        if isinstance(logit_rows, torch.Tensor) and len(logit_rows) < hidden.shape[1]:
            hidden = hidden.index_select(1, logit_rows)
        logits: torch.Tensor = frame.head(frame.norm(hidden))
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

    def take_over(self, frame: LlamaFrame, layers: Sequence[tuple[NativeLayer, Rule]]) -> None:
        """Let these answer for the model's layers.

        Neighbours of one window and of equal widths run in one call.
        """
        self._frame = frame
        window = context_window(self._model.config)
        like = torch.zeros(1, dtype=self._model.dtype, device=self._model.device)
        self._tables = RotaryTables(frame.rotary, window, like)
        self._layers = [_Layer(*layer) for layer in layers]
        kinds = [(layer.native.widths, layer.kind) for layer in self._layers]
        starts = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
        for start, stop in zip(starts, [*starts[1:], len(kinds)], strict=True):
            natives = [layer.native for layer in self._layers[start:stop]]
            self._stacks[start] = LayerStack(natives)

    def give_back(self) -> None:
        """Let transformers' layers run again."""
        self._frame = self._tables = None
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

    Nothing runs in C++ unless it is `wanted`. `site` and `projections` are what
    `inject` returned. Writes to the cache, which must not be in use yet.
    """
    if not wanted:
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
    serves = partial(decoder.attention.serves, model.dtype)
    if not all(map(serves, cache.keys, cache.values)):
        keys = cache.keys[0]
        raise Unsuited(
            f"attention is not in C++ for {model.dtype} on {keys.device}, heads of {keys.shape[2]}"
        )
    if any(
        keys.shape != values.shape for keys, values in zip(cache.keys, cache.values, strict=True)
    ):
        raise Unsuited("keys and values differ in size")
    rounded = any(isinstance(p.base, Int8Product) for p in projections)
    tolerance = _ROUNDED_TOLERANCE if rounded else _TOLERANCE
    if cache.keys[0].dtype != model.dtype:
        # What may be taken over shows best where nothing is rounded in between.
        whole = cache.similar(num_cells=_PROBE_CELLS, dtype=model.dtype)
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
    probe = _Probe(model, cache)
    expected = probe.run(decoder)
    layers: list[tuple[NativeLayer, Rule]] = []
    for number, path in enumerate(layer_paths(model)):
        rule = probe.rules[number]
        keys, values = cache.keys[number], cache.values[number]
        parts = layer_parts(model, path, projections, rule, keys)
        layers.append((NativeLayer(parts, keys, values), rule))
    decoder.take_over(frame, layers)
    for cached_bytes in (CACHED_BYTES, 0):  # all in one call, and layer by layer
        error = probe.run(decoder, cached_bytes) - expected
        relative = float(error.abs().max() / expected.abs().max())
        if not relative <= tolerance:
            raise Unsuited(f"their logits differ by {relative:.1e}")


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


class _Probe:
    """Two random sequences, fed to the model in pieces, as a server would."""

    def __init__(self, model: PreTrainedModel, cache: KVCache) -> None:
        self._cache = cache
        self.rules: dict[int, Rule] = {}
        # Whatever depends on the position beside the rotary tables shows at the window's end.
        window = int(model.config.max_position_embeddings)
        self._offsets = [max(window - sum(_PROBE_PIECES[0]), 0), 0]
        embedding = model.get_input_embeddings().weight
        assert isinstance(embedding, torch.Tensor)
        generator = torch.Generator().manual_seed(0)
        lengths = [sum(pieces) for pieces in _PROBE_PIECES]
        if sum(lengths) > len(cache.keys[0]):
            raise Unsuited("the KV cache is too small for a probe")
        self._ids = [torch.randint(len(embedding), (n,), generator=generator) for n in lengths]

    def run(self, decoder: NativeDecoder, cached_bytes: int = CACHED_BYTES) -> torch.Tensor:
        """The logits of all tokens, [num_tokens, vocab]; `rules` then holds how layers attend.

        With no `cached_bytes` the long piece is left to torch's attention.
        """
        begun = [0] * len(self._ids)
        logits = []
        for lengths in zip(*_PROBE_PIECES, strict=True):
            spans, row, start = [], 0, 0
            for ids, cached, new in zip(self._ids, begun, lengths, strict=True):
                spans.append(Span(row, new, cached, (start,), len(ids)))
                row, start = row + new, start + len(ids)
            logits.append(self._step(spans, decoder, cached_bytes))
            begun = [cached + new for cached, new in zip(begun, lengths, strict=True)]
        return torch.cat(logits)

    def _step(
        self, spans: Sequence[Span], decoder: NativeDecoder, cached_bytes: int
    ) -> torch.Tensor:
        cached = torch.cat([torch.arange(s.num_cached, s.num_total) for s in spans])
        offsets = torch.cat(
            [torch.full((s.num_new,), o) for o, s in zip(self._offsets, spans, strict=True)]
        )
        starts = torch.cat([torch.full((s.num_new,), s.starts[0]) for s in spans])
        tokens = [ids[s.num_cached : s.num_total] for ids, s in zip(self._ids, spans, strict=True)]
        step = AttentionStep(
            spans, cached + starts, self._cache, None, decoder.attention, cached_bytes
        )
        logits = decoder.logits(step, torch.cat(tokens)[None], (cached + offsets)[None], 0)
        self.rules = self.rules or step.rules
        return logits
