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
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dynamic_lora_adapters.layers import DeltaSite, GroupedProjection
from dynamic_lora_adapters.native import NativeUnavailable
from dynamic_lora_adapters.native.attention import NativeAttention
from dynamic_lora_adapters.native.layer import (
    DeltaRuns,
    LayerParts,
    LayerStep,
    NativeLayer,
    Site,
    delta_runs,
)
from dynamic_lora_adapters.native.norm import NativeRmsNorm
from dynamic_lora_adapters.native.product import PackedWeight
from dynamic_lora_adapters.segments import DeltaPlan
from dynamic_lora_server.engine.attention import AttentionStep, Rule, attending
from dynamic_lora_server.engine.batch import Span
from dynamic_lora_server.engine.kv_cache import KVCache
from dynamic_lora_server.engine.probe import forward, packed_spans, run_packed

logger = logging.getLogger(__name__)

_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Largest logit difference, relative to the largest logit: what the order of sums makes.
_TOLERANCE = 1e-4
# The probe's sequences: a long one whose prompt comes in two pieces, and a short one.
_PROBE_PIECES = ((20, 3), (1, 4))


class _Unsuited(Exception):
    """The model's layers are not of the one kind that is taken over; the text says why."""


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
                return native.run(step, hidden_states)
            q, attended = native.attend(step, hidden_states)
            running.attention.attend_others(number, q, attended, rule)
            return native.finish(step, hidden_states, attended)

        self._originals.append((module, own))
        module.forward = forward

    def give_back(self) -> None:
        """Let transformers' layers run again."""
        for module, own in self._originals:
            module.forward = own
        self._originals.clear()


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
    except (NativeUnavailable, _Unsuited) as reason:
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
        raise _Unsuited("not all of them have the parts of a Llama layer")
    if not all(map(decoder.attention.serves, cache.keys, cache.values)):
        raise _Unsuited("attention is not in C++ for heads of this size")
    probe = _Probe(model, cache)
    expected = probe.run(decoder)
    for number, path in enumerate(_layer_paths(model)):
        rule = probe.rules[number]
        keys, values = cache.keys[number], cache.values[number]
        if keys.shape != values.shape:
            raise _Unsuited("keys and values differ in size")
        parts = _parts(model, path, projections, rule, keys)
        native = NativeLayer(parts, keys, values)
        decoder.take_over(model.get_submodule(path), native, number, rule)
    error = float((probe.run(decoder) - expected).abs().max() / expected.abs().max())
    if not error <= _TOLERANCE:
        raise _Unsuited(f"their logits differ by {error:.1e}")


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
            raise _Unsuited("the KV cache is too small for a probe")
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


def has_llama_layers(model: PreTrainedModel) -> bool:
    """Whether all decoder layers have the parts of a Llama layer, by name."""
    return len(_layer_paths(model)) == int(model.config.num_hidden_layers)


def _layer_paths(model: PreTrainedModel) -> list[str]:
    return [p for p, m in model.named_modules() if _children(m) == _LAYER_PARTS]


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _parts(
    model: PreTrainedModel,
    path: str,
    projections: Sequence[GroupedProjection],
    rule: Rule,
    keys: torch.Tensor,
) -> LayerParts:
    layer, attention = model.get_submodule(path), model.get_submodule(f"{path}.self_attn")
    names = _children(attention)
    if names - _HEAD_NORMS != _PROJECTIONS or names & _HEAD_NORMS not in (set(), _HEAD_NORMS):
        raise _Unsuited(f"attention is made of {', '.join(sorted(names))}")
    if _children(model.get_submodule(f"{path}.mlp")) != _MLP_PARTS:
        raise _Unsuited("the layers have no gated MLP")
    if rule.sinks is not None or rule.softcap is not None:
        raise _Unsuited("attention has sinks or a soft cap")
    qkv, (q, k, v) = _packed(projections, [f"{path}.self_attn.{name}_proj" for name in "qkv"])
    gate_up, (gate, up) = _packed(projections, [f"{path}.mlp.{n}_proj" for n in ("gate", "up")])
    o, _ = _packed(projections, [f"{path}.self_attn.o_proj"])
    down, _ = _packed(projections, [f"{path}.mlp.down_proj"])
    parts = LayerParts(
        input_norm=_norm(layer, "input_layernorm"),
        middle_norm=_norm(layer, "post_attention_layernorm"),
        q_norm=_norm(attention, "q_norm") if "q_norm" in names else None,
        k_norm=_norm(attention, "k_norm") if "k_norm" in names else None,
        qkv=qkv,
        o=o,
        gate_up=gate_up,
        down=down,
        heads=len(q) // keys.shape[2],
        kv_heads=keys.shape[1],
        dim=keys.shape[2],
        q=q.start,
        k=k.start,
        v=v.start,
        gate=gate.start,
        up=up.start,
        scaling=rule.scaling,
    )
    if not _fits(parts, widths=[len(part) for part in (q, k, v, gate, up)]):
        raise _Unsuited("the layers' sizes are not Llama's")
    return parts


def _fits(parts: LayerParts, widths: list[int]) -> bool:
    """Whether all sizes agree, for C++ reads and writes by them; `widths` of q, k, v, gate, up."""
    qkv, o, gate_up, down = (
        site.base.projection for site in (parts.qkv, parts.o, parts.gate_up, parts.down)
    )
    hidden, new = o.n, parts.kv_heads * parts.dim
    head_norms = [norm for norm in (parts.q_norm, parts.k_norm) if norm is not None]
    return (
        widths == [parts.heads * parts.dim, new, new, down.k, down.k]
        and o.k == widths[0]
        and parts.heads % parts.kv_heads == 0
        and qkv.k == gate_up.k == down.n == hidden
        and len(parts.input_norm.weight) == len(parts.middle_norm.weight) == hidden
        and all(len(norm.weight) == parts.dim for norm in head_norms)
    )


def _packed(projections: Sequence[GroupedProjection], paths: list[str]) -> tuple[Site, list[range]]:
    """The projection of exactly these paths, and the columns of each in its output."""
    for projection in projections:
        group = projection.group
        if set(group.paths) == set(paths):
            if not isinstance(projection.base, PackedWeight):
                raise _Unsuited("its products are not in C++")
            stops = dict(zip(group.paths, accumulate(group.widths), strict=True))
            widths = dict(zip(group.paths, group.widths, strict=True))
            columns = [range(stops[path] - widths[path], stops[path]) for path in paths]
            return Site(projection.base, projection.index), columns
    raise _Unsuited(f"{' and '.join(paths)} do not share their input alone")


def _norm(module: nn.Module, name: str) -> NativeRmsNorm:
    norm = getattr(module, name).forward
    if not isinstance(norm, NativeRmsNorm):
        raise _Unsuited(f"{name} is not in C++")
    return norm
