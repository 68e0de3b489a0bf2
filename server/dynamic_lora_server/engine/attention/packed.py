"""Attention over a packed batch and the KV cache, for transformers' models.

transformers' `AttentionInterface` lets every model that uses it call one
function for attention. Ours writes the new keys and values to the cache and
attends, sequence by sequence, to what the cache holds. The step at hand is
passed beside the model, in a context variable that `attending` sets.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from dynamic_lora_adapters.apply.uncompiled import uncompiled
from dynamic_lora_adapters.geometry import LayerGeometry
from dynamic_lora_adapters.native.attention import NativeAttention
from dynamic_lora_adapters.transfer import to_device
from dynamic_lora_server.engine.attention.fused import attend_decode, attend_prompt
from dynamic_lora_server.engine.attention.grouped import DecodeGroup, group_decodes
from dynamic_lora_server.engine.attention.paged import PagedKernel
from dynamic_lora_server.engine.batch import Span
from dynamic_lora_server.engine.kv.cache import KVCache
from dynamic_lora_server.errors import UnsupportedModel
from dynamic_lora_server.noop import noop

ATTENTION_NAME = "dynamic_lora"

# New tokens are attended to one by one in C++, each reading its sequence's keys and values. For
# more than FEW_TOKENS of one sequence that is as fast as torch's kernel, which reads them once for
# many tokens, as long as a layer's keys and values stay in the processor's cache.
FEW_TOKENS = 8
CACHED_BYTES = 2**22

# Arguments that models pass along and that change nothing here.
_BENIGN = frozenset(
    {
        "dropout",
        "position_ids",
        "use_cache",
        "cache_position",
        "output_attentions",
        "output_router_logits",
        "is_causal",
    }
)


@dataclass(frozen=True, slots=True)
class Rule:
    """How a layer attends: what transformers passes beside q, k and v."""

    scaling: float
    window: int | None = None  # a token sees itself and the window - 1 before it
    softcap: float | None = None
    sinks: torch.Tensor | None = None  # one logit per head, as in GPT-OSS

    @property
    def plain(self) -> bool:
        """Whether `scaled_dot_product_attention` computes it."""
        return self.softcap is None and self.sinks is None


@dataclass(slots=True)
class AttentionStep:
    """One forward pass: the spans of the batch and, but for the probe, the cache.

    Without a cache each sequence attends to its own new tokens only, and the
    layers' geometry is recorded; the start-up probe uses this. Sequences with more
    than FEW_TOKENS new ones are left to torch's kernel where a layer has more than
    `cached_bytes` of keys and values for them. `before_compute`: see `Engine.step`.
    """

    spans: Sequence[Span]
    cells: torch.Tensor | None = None
    cache: KVCache | None = None
    paged_kernel: PagedKernel | None = None
    native: NativeAttention | None = None
    cached_bytes: int = field(default_factory=lambda: CACHED_BYTES)
    before_compute: Callable[[], object] = noop
    observed: dict[int, LayerGeometry] = field(default_factory=dict)
    rules: dict[int, Rule] = field(default_factory=dict)
    _masks: dict[tuple[int, int, int | None], torch.Tensor] = field(default_factory=dict)
    _gathers: dict[int, torch.Tensor] = field(default_factory=dict)
    _splits: dict[int | None, tuple[list[DecodeGroup], list[Span]]] = field(default_factory=dict)
    _items: dict[tuple[int | None, int], tuple[torch.Tensor, list[Span]]] = field(
        default_factory=dict
    )

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        """Write the new keys and values, then attend.

        Shapes: q [heads, num_tokens, dim], k, v [kv_heads, num_tokens, dim];
        returns [num_tokens, heads, value_dim].
        """
        self.observed[layer] = LayerGeometry(k.shape[0], k.shape[2], v.shape[2])
        self.rules[layer] = rule
        if self.cache is None:
            out = q.new_empty(q.shape[1], q.shape[0], v.shape[2])
            for span in self.spans:
                new = _rows(q, span), _rows(k, span), _rows(v, span)
                _place(out, span, self._attend_one(*new, rule))
            return out
        assert self.cells is not None
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.native is not None and self.native.serves(q.dtype, keys, values):
            return self._attend_natively(self.native, q, k, v, keys, values, rule)
        self.cache.write(layer, self.cells, k.transpose(0, 1), v.transpose(0, 1))
        if self.paged_kernel is not None and rule.plain:
            return self.paged_kernel(q.transpose(0, 1), keys, values, rule.scaling, rule.window)
        return self._attend_cached(q, keys, values, rule)

    def _attend_natively(
        self,
        native: NativeAttention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rule: Rule,
    ) -> torch.Tensor:
        assert self.cells is not None
        native.write(keys, self.cells, k)
        native.write(values, self.cells, v)
        items, others = self.native_items(rule, keys, values)
        out = q.new_empty(q.shape[1], q.shape[0], values.shape[2])
        native.attend(
            q,
            keys,
            values,
            out,
            items,
            scaling=rule.scaling,
            softcap=rule.softcap,
            sinks=rule.sinks,
        )
        self._attend_singly(out, others, q, keys, values, rule)
        return out

    def native_items(
        self, rule: Rule, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, list[Span]]:
        """What is attended to token by token in C++, and the spans that are left.

        `keys` and `values` [cells, kv_heads, dim] are the cache of a layer with this rule.
        """
        # Soft caps take a tanh for every score, which C++ computes one by one.
        cached_bytes = self.cached_bytes if rule.softcap is None else 0
        longest = cached_bytes // (keys[0].nbytes + values[0].nbytes)
        if (rule.window, longest) not in self._items:
            self._items[rule.window, longest] = _native_items(self.spans, rule.window, longest)
        return self._items[rule.window, longest]

    def attend_others(self, layer: int, q: torch.Tensor, out: torch.Tensor, rule: Rule) -> None:
        """Fill in the rows of `out` that `native_items` left, once a layer has written the cache.

        Shapes: q [heads, num_tokens, dim], out [num_tokens, heads, value_dim].
        """
        assert self.cache is not None
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        _, others = self.native_items(rule, keys, values)
        self._attend_singly(out, others, q, keys, values, rule)

    def _attend_cached(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        groups, singles = self._split(q, rule)
        out = q.new_empty(q.shape[1], q.shape[0], values.shape[2])
        for group in groups:
            out.index_copy_(0, group.rows, group.attend(q, keys, values, rule.scaling))
        self._attend_singly(out, singles, q, keys, values, rule)
        return out

    def _attend_singly(
        self,
        out: torch.Tensor,
        spans: Sequence[Span],
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rule: Rule,
    ) -> None:
        for span in spans:
            k, v = self._history(keys, span), self._history(values, span)
            _place(out, span, self._attend_one(_rows(q, span), k, v, rule))

    def _split(self, q: torch.Tensor, rule: Rule) -> tuple[Sequence[DecodeGroup], Sequence[Span]]:
        """Groups of decoding spans and the other spans; the same for all layers of a kind."""
        if not rule.plain:
            return (), self.spans
        if rule.window not in self._splits:
            self._splits[rule.window] = group_decodes(self.spans, rule.window, q)
        return self._splits[rule.window]

    def _history(self, table: torch.Tensor, span: Span) -> torch.Tensor:
        """Cached entries of a sequence, [kv_heads, num_total, dim]; a view where it can be."""
        if len(span.starts) == 1:
            start = span.starts[0]
            return table[start : start + span.num_total].transpose(0, 1)
        if span.row not in self._gathers:
            positions = torch.arange(span.num_total)
            starts = torch.tensor(span.starts)[positions // span.chunk_size]
            cells = starts + positions % span.chunk_size
            self._gathers[span.row] = to_device(cells, table.device)
        return table.index_select(0, self._gathers[span.row]).transpose(0, 1)

    def _attend_one(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        """q [heads, new, dim] over k, v [kv_heads, total, dim] -> [heads, new, dim]."""
        if q.shape[1] == 1 and rule.window is not None:
            k, v = k[:, -rule.window :], v[:, -rule.window :]
        k, v = k.to(q.dtype), v.to(q.dtype)  # those of the cache may be shorter
        if not rule.plain:
            return _attend_by_hand(q, k, v, rule, self._mask(q, k, rule.window))
        if q.shape[1] == 1:
            return attend_decode(q, k, v, rule.scaling)
        windowed = rule.window is not None and k.shape[1] > rule.window
        if q.is_cuda:
            mask = self._mask(q, k, rule.window) if windowed else None
            return attend_prompt(q, k, v, rule.scaling, mask)
        whole = q.shape[1] == k.shape[1] and not windowed
        return F.scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            attn_mask=None if whole else self._mask(q, k, rule.window),
            is_causal=whole,
            scale=rule.scaling,
            enable_gqa=q.shape[0] != k.shape[0],
        )[0]

    def _mask(self, q: torch.Tensor, k: torch.Tensor, window: int | None) -> torch.Tensor | None:
        """True where a new token may look, [new, total]; None if it may look everywhere."""
        if q.shape[1] == 1:
            return None
        key = (q.shape[1], k.shape[1], window)
        if key not in self._masks:
            last = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)[:, None]
            column = torch.arange(k.shape[1], device=q.device)
            mask = column <= last
            if window is not None:
                mask &= column > last - window
            self._masks[key] = mask
        return self._masks[key]


def _native_items(
    spans: Sequence[Span], window: int | None, longest: int
) -> tuple[torch.Tensor, list[Span]]:
    """What `NativeAttention.attend` does for single tokens, and the spans that are left."""
    items: list[tuple[int, int, int]] = []
    others: list[Span] = []
    for span in spans:
        many = span.num_new > FEW_TOKENS and span.num_total > longest
        if many or len(span.starts) > 1:
            others.append(span)
            continue
        for number in range(span.num_new):
            stop = span.num_cached + number + 1
            seen = stop if window is None else min(stop, window)
            items.append((span.row + number, span.starts[0] + stop - seen, seen))
    return torch.tensor(items, dtype=torch.long).reshape(-1, 3), others


def _rows(x: torch.Tensor, span: Span) -> torch.Tensor:
    return x[:, span.row : span.row + span.num_new]


def _place(out: torch.Tensor, span: Span, attended: torch.Tensor) -> None:
    """Put [heads, num_new, dim] of a span into its rows of [num_tokens, heads, dim]."""
    out[span.row : span.row + span.num_new] = attended.transpose(0, 1)


def _attend_by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention with soft-capped logits (Gemma 2) or sinks (GPT-OSS), step by step."""
    grouped = q.unflatten(0, (k.shape[0], -1))  # [kv_heads, group, new, dim]
    scores = grouped @ k[:, None].transpose(2, 3) * rule.scaling
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if rule.sinks is not None:
        sinks = rule.sinks.view(k.shape[0], -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores.float(), dim=-1).to(q.dtype)
    return (weights[..., : k.shape[1]] @ v[:, None]).flatten(0, 1)


_STEP: ContextVar[AttentionStep] = ContextVar("attention_step")


@contextmanager
def attending(step: AttentionStep) -> Iterator[AttentionStep]:
    """Make `step` the one that the model's attention calls refer to."""
    token = _STEP.set(step)
    try:
        yield step
    finally:
        _STEP.reset(token)


@uncompiled
def attention_function(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: query [1, heads, tokens, dim] -> [1, tokens, heads, dim]."""
    _refuse_unknown(module, attention_mask, extra)
    layer = module.layer_idx
    assert isinstance(layer, int)
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    rule = Rule(scaling, sliding_window, softcap, s_aux)
    return _STEP.get().attend(layer, query[0], key[0], value[0], rule)[None], None


def _refuse_unknown(
    module: nn.Module, attention_mask: torch.Tensor | None, extra: dict[str, Any]
) -> None:
    kind = type(module).__name__
    if attention_mask is not None:
        raise UnsupportedModel(f"{kind} builds its own attention mask, which is not served.")
    if extra.get("is_causal") is False:
        raise UnsupportedModel(f"{kind} is not causal; only decoder-only models are served.")
    unknown = [n for n, value in extra.items() if value is not None and n not in _BENIGN]
    if unknown:
        raise UnsupportedModel(f"{kind} passes {', '.join(unknown)} to attention; not served.")


AttentionInterface.register(ATTENTION_NAME, attention_function)
