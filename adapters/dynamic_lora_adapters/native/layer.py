"""Whole decoder layers of the Llama family in C++: neighbours in one parallel region."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dynamic_lora_adapters.native.library import allocating, load_library
from dynamic_lora_adapters.native.norm import NativeRmsNorm, NormParts
from dynamic_lora_adapters.native.product import NativeProduct, Projection
from dynamic_lora_adapters.segments import DeltaPlan, Effect, Run

_POINTER = ctypes.c_void_p
_SIZE = ctypes.c_int64


class _Site(ctypes.Structure):
    _fields_ = [("base", Projection), ("group", _SIZE)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *[(name, NormParts) for name in ("input_norm", "middle_norm", "q_norm", "k_norm")],
        *[(name, _Site) for name in ("qkv", "o", "gate_up", "down")],
        *[(name, _POINTER) for name in ("keys", "values")],
        ("in_bfloat16", _SIZE),
        *[(name, _SIZE) for name in ("heads", "kv_heads", "dim", "q", "k", "v", "gate", "up")],
        ("scaling", ctypes.c_float),
    ]


class _Run(ctypes.Structure):
    _fields_ = [
        *[(name, _POINTER) for name in ("groups", "lengths")],
        *[(name, _SIZE) for name in ("first_slot", "slots", "row")],
        ("sign", ctypes.c_float),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *[(name, _POINTER) for name in ("cos", "sin", "places", "cells", "items", "runs")],
        *[(name, _SIZE) for name in ("rows", "num_items", "num_runs", "alone")],
    ]


@dataclass(frozen=True, slots=True)
class Site:
    """A packed projection, and the number of its group among all of the model's."""

    base: NativeProduct
    group: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """What a layer is made of.

    `q`, `k`, `v` are the first columns of each in the outputs of `qkv`, `gate`
    and `up` in those of `gate_up`. The two norms of heads are optional.
    """

    input_norm: NativeRmsNorm
    middle_norm: NativeRmsNorm
    q_norm: NativeRmsNorm | None
    k_norm: NativeRmsNorm | None
    qkv: Site
    o: Site
    gate_up: Site
    down: Site
    heads: int
    kv_heads: int
    dim: int
    q: int
    k: int
    v: int
    gate: int
    up: int
    scaling: float


class LayerStep:
    """What all layers of one step share: where its tokens and deltas are, and room for outputs.

    `cells` [rows] are written, `items` [num_items, 3] attended to, as
    `NativeAttention.attend` has them. Tokens that are each `alone` are of different sequences:
    none sees what another writes.
    """

    def __init__(
        self, cells: torch.Tensor, items: torch.Tensor, runs: "DeltaRuns", *, alone: bool = False
    ) -> None:
        self.num_rows = len(cells)
        self.items = items
        self._cells = cells
        self._runs = runs
        self._rotary: tuple[torch.Tensor, ...] | None = None
        self._qkv: torch.Tensor | None = None
        self._attended: torch.Tensor | None = None
        self._c = _Step(
            cells=cells.data_ptr(),
            items=items.data_ptr(),
            runs=ctypes.addressof(runs.array),
            rows=self.num_rows,
            num_items=len(items),
            num_runs=runs.count,
            alone=alone,
        )
        self.address = ctypes.addressof(self._c)

    def rotate_by(
        self, cos: torch.Tensor, sin: torch.Tensor, places: torch.Tensor, dim: int
    ) -> None:
        """Set the tables [positions, dim], float32, and the row in them of each token, [rows].

        Raises ValueError for tables that rotate a part of a head only.
        """
        if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[1] != dim:
            raise ValueError(f"rotary tables {tuple(cos.shape)} are not for heads of {dim}")
        assert cos.dtype == sin.dtype == torch.float32
        assert places.dtype == torch.int64 and len(places) == self.num_rows
        self._rotary = cos.contiguous(), sin.contiguous(), places.contiguous()
        self._c.cos, self._c.sin, self._c.places = (table.data_ptr() for table in self._rotary)

    def room(self, qkv_width: int, attended_width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory [rows, width] for projected and attended rows; each layer overwrites it."""
        if self._qkv is None or self._qkv.shape[1] != qkv_width:
            self._qkv = torch.empty(self.num_rows, qkv_width, dtype=torch.float32)
        if self._attended is None or self._attended.shape[1] != attended_width:
            self._attended = torch.empty(self.num_rows, attended_width, dtype=torch.float32)
        return self._qkv, self._attended


@dataclass(frozen=True, slots=True)
class DeltaRuns:
    """The runs of a plan, laid out for C++; `kept` are what it points at."""

    array: "ctypes.Array[_Run]"
    count: int
    kept: Sequence[object]


def delta_runs(plan: DeltaPlan) -> DeltaRuns | None:
    """The runs of a plan of low-rank terms alone; None if there are terms of other kinds."""
    if not all(run.slab.low_rank for run in plan.runs):
        return None
    # The merged adapter's own rows need nothing more: it has no terms that no weight holds.
    runs = [run for run in plan.runs if run.effect is not Effect.REST]
    array = (_Run * len(runs))(*map(_run, runs))
    return DeltaRuns(array, len(runs), runs)


def _run(run: Run) -> _Run:
    return _Run(
        groups=run.slab.addresses().data_ptr(),
        lengths=run.lengths_tensor().data_ptr(),
        first_slot=run.slot_start,
        slots=run.num_slots,
        row=run.row_start,
        sign=run.sign,
    )


class NativeLayer:
    """One layer, with its part of the KV cache: keys and values [cells, kv_heads, dim].

    Float32 on a CPU; keys and values may be bfloat16. Raises NativeUnavailable where it
    cannot be compiled.
    """

    def __init__(self, parts: LayerParts, keys: torch.Tensor, values: torch.Tensor) -> None:
        library = load_library("layer")
        self._attend = allocating(library, "dynamic_lora_layer_attend", [_POINTER] * 5)
        self._finish = allocating(library, "dynamic_lora_layer_finish", [_POINTER] * 5)
        self.parts = parts
        norms = (parts.input_norm, parts.middle_norm, parts.q_norm, parts.k_norm)
        self._kept = keys, values, [norm.weight for norm in norms if norm is not None]
        self._c = _layer(parts, keys, values)
        self.address = ctypes.addressof(self._c)
        self.widths = parts.qkv.base.projection.n, parts.heads * parts.dim

    def attend(self, step: LayerStep, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the cache, and attend for the tokens among the items.

        Returns the rotated queries [heads, rows, dim], and [rows, heads, dim] with
        what was attended to; the caller fills in the other rows.
        """
        qkv, attended = step.room(*self.widths)
        hidden = self.checked(step, hidden)
        self._attend(
            self.address, step.address, hidden.data_ptr(), qkv.data_ptr(), attended.data_ptr()
        )
        parts = self.parts
        q = qkv[:, parts.q : parts.q + parts.heads * parts.dim]
        shape = (-1, parts.heads, parts.dim)
        return q.unflatten(1, shape[1:]).transpose(0, 1), attended.view(shape)

    def finish(self, step: LayerStep, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The layer's output, from what `attend` returned, filled in."""
        hidden = self.checked(step, hidden)
        out = torch.empty_like(hidden)
        self._finish(
            self.address, step.address, hidden.data_ptr(), attended.data_ptr(), out.data_ptr()
        )
        return out

    def checked(self, step: LayerStep, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states as C++ reads them."""
        width = self.parts.o.base.projection.n
        assert hidden.dtype == torch.float32 and hidden.numel() == step.num_rows * width
        return hidden.contiguous()


class LayerStack:
    """Layers of one kind that follow each other, in one call.

    Python's lock is asked for again once, not once a layer: with another thread
    that writes answers, each time may be a wait.
    """

    def __init__(self, layers: Sequence[NativeLayer]) -> None:
        argtypes = [_POINTER, _SIZE, *[_POINTER] * 5]
        self._run = allocating(load_library("layer"), "dynamic_lora_layers", argtypes)
        self._layers = layers
        self.num_layers = len(layers)
        self._addresses = (_POINTER * len(layers))(*(layer.address for layer in layers))

    def run(self, step: LayerStep, hidden: torch.Tensor) -> torch.Tensor:
        """The last layer's output for hidden [..., rows, width]; every token is among the items."""
        first = self._layers[0]
        qkv, attended = step.room(*first.widths)
        hidden = first.checked(step, hidden)
        out = torch.empty_like(hidden)
        self._run(
            self._addresses,
            len(self._layers),
            step.address,
            hidden.data_ptr(),
            qkv.data_ptr(),
            attended.data_ptr(),
            out.data_ptr(),
        )
        return out


def _layer(parts: LayerParts, keys: torch.Tensor, values: torch.Tensor) -> _Layer:
    return _Layer(
        input_norm=NormParts.of(parts.input_norm),
        middle_norm=NormParts.of(parts.middle_norm),
        q_norm=NormParts.of(parts.q_norm),
        k_norm=NormParts.of(parts.k_norm),
        qkv=_site(parts.qkv),
        o=_site(parts.o),
        gate_up=_site(parts.gate_up),
        down=_site(parts.down),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        in_bfloat16=keys.dtype == torch.bfloat16,
        heads=parts.heads,
        kv_heads=parts.kv_heads,
        dim=parts.dim,
        q=parts.q,
        k=parts.k,
        v=parts.v,
        gate=parts.gate,
        up=parts.up,
        scaling=parts.scaling,
    )


def _site(site: Site) -> _Site:
    return _Site(base=site.base.projection, group=site.group)
