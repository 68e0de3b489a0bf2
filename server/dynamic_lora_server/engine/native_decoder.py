"""Decoder layers in C++ in the place of transformers', where both give the same logits.

transformers' code stays the definition: a layer is taken over only if it has the
parts and sizes of a Llama layer, and if the whole model's logits are the same with
and without, over a KV cache, in several pieces, at the first positions and at the
last. Steps that hold more than low-rank terms run through transformers' own layers.
Hooks on modules within a layer that is taken over are not called.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
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
from dynamic_lora_adapters.native.product import Int8Product
from dynamic_lora_adapters.segments import DeltaPlan
from dynamic_lora_server.engine.attention import AttentionStep, Rule, attending
from dynamic_lora_server.engine.batch import Span
from dynamic_lora_server.engine.kv_cache import KVCache
from dynamic_lora_server.engine.llama_layers import (
    Unsuited,
    has_llama_layers,
    layer_parts,
    layer_paths,
)
from dynamic_lora_server.engine.probe import forward, packed_spans, run_packed

logger = logging.getLogger(__name__)

# Largest logit difference, relative to the largest logit: what the order of sums makes.
_TOLERANCE = 1e-4
# Where inputs are rounded to sixteen bits, a difference in float32's last place may become one
# of 2^-15 of the largest input, in every layer; over SmolLM2's thirty that makes 4e-4.
_ROUNDED_TOLERANCE = 2e-3
# The probe's sequences: a long one whose prompt comes in two pieces, and a short one.
_PROBE_PIECES = ((20, 3), (1, 4))


@dataclass(frozen=True, slots=True)
class _Running:
    attention: AttentionStep
    runs: DeltaRuns
    steps: dict[int | None, LayerStep] = field(default_factory=dict)

    def layers(self, window: int | None) -> LayerStep:
        """What the layers with this attention window share."""
        if window not in self.steps:
            cells = self.attention.cells
            assert cells is not None
            items, _ = self.attention.native_items(window)
            self.steps[window] = LayerStep(cells, items, self.runs)
        return self.steps[window]


class NativeDecoder:
    """The layers of one model that run in C++ while a step is `serving`.

    `attention` is there wherever C++ is, whether or not there are such layers.
    """

    def __init__(self, site: DeltaSite, attention: NativeAttention | None = None) -> None:
        self.attention = attention
        self._site = site
        self._running: _Running | None = None
        self._originals: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._stacks: dict[int, LayerStack] = {}

    @property
    def num_layers(self) -> int:
        """How many layers were taken over: all of the model's, or none."""
        return len(self._originals)

    @contextmanager
    def serving(self, step: AttentionStep) -> Iterator[None]:
        """Run the layers in C++ for a step whose terms allow it, else as transformers does."""
        self._running = self._prepare(step) if self._originals else None
        try:
            yield
        finally:
            self._running = None

    def _prepare(self, step: AttentionStep) -> _Running | None:
        site = self._site
        if step.cells is None or any(s.terms.overrides for s in site.segments):
            return None
        runs = delta_runs(DeltaPlan(()) if site.plan is None else site.plan)
        return None if runs is None else _Running(step, runs)

    def take_over(self, module: nn.Module, native: NativeLayer, number: int, rule: Rule) -> None:
        """Let `native` answer for a decoder layer, the model's layer `number`."""
        own: Callable[..., torch.Tensor] = module.forward

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            running = self._running
            if running is None:
                return own(hidden_states, *args, **kwargs)
            step = running.layers(rule.window)
            cos, sin = kwargs["position_embeddings"]
            step.rotate_by(cos, sin, native.parts.dim)
            _, others = running.attention.native_items(rule.window)
            if not others:
                # The first layer of a stack answers for all of it.
                stack = self._stacks.get(number)
                return hidden_states if stack is None else stack.run(step, hidden_states)
            q, attended = native.attend(step, hidden_states)
            running.attention.attend_others(number, q, attended, rule)
            return native.finish(step, hidden_states, attended)

        self._originals.append((module, own))
        module.forward = forward

    def stack(self, layers: Sequence[NativeLayer], windows: Sequence[int | None]) -> None:
        """Run neighbouring layers of one window and of equal widths in one call."""
        kinds = [(layer.widths, window) for layer, window in zip(layers, windows, strict=True)]
        starts = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
        for start, stop in zip(starts, [*starts[1:], len(layers)], strict=True):
            self._stacks[start] = LayerStack(layers[start:stop])

    def give_back(self) -> None:
        """Let transformers' layers run again."""
        for module, own in self._originals:
            module.forward = own
        self._originals.clear()
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
        return NativeDecoder(site)
    try:
        attention = NativeAttention()
    except NativeUnavailable as reason:
        logger.info("Attention is torch's: %s", reason)
        return NativeDecoder(site)
    decoder = NativeDecoder(site, attention)
    try:
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
    if not all(map(decoder.attention.serves, cache.keys, cache.values)):
        keys = cache.keys[0]
        raise Unsuited(
            f"attention is not in C++ for {keys.dtype} on {keys.device}, heads of {keys.shape[2]}"
        )
    probe = _Probe(model, cache)
    expected = probe.run(decoder)
    layers: list[NativeLayer] = []
    for number, path in enumerate(layer_paths(model)):
        rule = probe.rules[number]
        keys, values = cache.keys[number], cache.values[number]
        if keys.shape != values.shape:
            raise Unsuited("keys and values differ in size")
        parts = layer_parts(model, path, projections, rule, keys)
        native = NativeLayer(parts, keys, values)
        decoder.take_over(model.get_submodule(path), native, number, rule)
        layers.append(native)
    decoder.stack(layers, [probe.rules[number].window for number in range(len(layers))])
    error = float((probe.run(decoder) - expected).abs().max() / expected.abs().max())
    rounded = any(isinstance(p.base, Int8Product) for p in projections)
    if not error <= (_ROUNDED_TOLERANCE if rounded else _TOLERANCE):
        raise Unsuited(f"their logits differ by {error:.1e}")


def decode_trial(
    model: PreTrainedModel, cache: KVCache, decoder: NativeDecoder
) -> Callable[[int], torch.Tensor]:
    """A step of so many sequences of one new token and nothing before it, to be timed.

    Where layers run in C++ it writes to the cache, which must not be in use.
    """

    def run(num_rows: int) -> torch.Tensor:
        ids = [torch.zeros(1, dtype=torch.long, device=model.device)] * num_rows
        step = AttentionStep(packed_spans((1,) * num_rows))
        if decoder.num_layers and num_rows <= len(cache.keys[0]):
            step.cells, step.cache, step.native = torch.arange(num_rows), cache, decoder.attention
        with attending(step), decoder.serving(step):
            return run_packed(model, ids)

    return run


class _Probe:
    """Two random sequences, fed to the model in pieces, as a server would."""

    def __init__(self, model: PreTrainedModel, cache: KVCache) -> None:
        self._model = model
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

    def run(self, decoder: NativeDecoder) -> torch.Tensor:
        """The logits of all tokens, [num_tokens, vocab]; `rules` then holds how layers attend."""
        begun = [0] * len(self._ids)
        logits = []
        for lengths in zip(*_PROBE_PIECES, strict=True):
            spans, row, start = [], 0, 0
            for ids, cached, new in zip(self._ids, begun, lengths, strict=True):
                spans.append(Span(row, new, cached, (start,), len(ids)))
                row, start = row + new, start + len(ids)
            logits.append(self._step(spans, decoder))
            begun = [cached + new for cached, new in zip(begun, lengths, strict=True)]
        return torch.cat(logits)

    def _step(self, spans: Sequence[Span], decoder: NativeDecoder) -> torch.Tensor:
        cached = torch.cat([torch.arange(s.num_cached, s.num_total) for s in spans])
        offsets = torch.cat(
            [torch.full((s.num_new,), o) for o, s in zip(self._offsets, spans, strict=True)]
        )
        starts = torch.cat([torch.full((s.num_new,), s.starts[0]) for s in spans])
        tokens = [ids[s.num_cached : s.num_total] for ids, s in zip(self._ids, spans, strict=True)]
        step = AttentionStep(spans, cached + starts, self._cache, None, decoder.attention)
        with attending(step), decoder.serving(step):
            logits = forward(self._model, torch.cat(tokens)[None], (cached + offsets)[None], 0)
        self.rules = self.rules or step.rules
        return logits
