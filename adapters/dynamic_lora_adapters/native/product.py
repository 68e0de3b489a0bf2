"""The base product in C++, from a weight in panels: in float32, in bfloat16 or in eight bits."""

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from dynamic_lora_adapters.arena import Arena
from dynamic_lora_adapters.native.library import allocating, load_library
from dynamic_lora_adapters.weight import Weight, parts_of

logger = logging.getLogger(__name__)

_POINTER = ctypes.c_void_p
_SIZE = ctypes.c_int64
_ARENA = Arena()
# What `projection.h` calls Format.
_FORMATS = {torch.float32: 0, torch.int8: 1, torch.bfloat16: 2, torch.uint8: 3}
# How weights are packed. Those of eight bits have scales; the last are beside inputs in eight bits.
_PACK = {
    torch.float32: "dynamic_lora_pack",
    torch.bfloat16: "dynamic_lora_pack_bfloat16",
    torch.int8: "dynamic_lora_pack_int8",
    torch.uint8: "dynamic_lora_pack_w8a8",
}
_SCALED = (torch.int8, torch.uint8)
# What `kept_weight.h` calls Format.
_KEPT_IN = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Projection(ctypes.Structure):
    """What `projection.h` calls by this name: the addresses and sizes of one linear layer."""

    _fields_ = [
        ("packed", _POINTER),
        ("scale", _POINTER),
        ("bias", _POINTER),
        ("n", _SIZE),
        ("k", _SIZE),
        ("format", _SIZE),
        ("halves", _SIZE),
    ]


class _KeptRows(ctypes.Structure):
    """What `kept_weight.h` calls KeptRows."""

    _fields_ = [("data", _POINTER), ("stride", _SIZE), ("rows", _SIZE), ("format", _SIZE)]


class NativeProduct:
    """`x @ W.T + bias` in float32 on a CPU, from a packed copy of the weight [out, in].

    The weight may be kept in float32, bfloat16 or float16. With `halves`, panels of either half of
    the outputs lie in turns, if the halves are whole panels. `projection` tells other C++ where it
    lies, as long as this object lives. Raises NativeUnavailable where it cannot be compiled.
    """

    separate = True
    _dtype = torch.float32

    def __init__(self, weight: Weight, bias: torch.Tensor | None, *, halves: bool = False) -> None:
        library = load_library("product")
        argtypes = [ctypes.POINTER(Projection), _POINTER, _POINTER, _SIZE]
        self._product = allocating(library, "dynamic_lora_product", argtypes)
        parts = parts_of(weight)
        self._out_features, self._in_features = sum(map(len, parts)), parts[0].shape[1]
        self._packed = _panels(library, self._out_features, self._in_features, self._dtype)
        self._halves = halves and self._out_features % (2 * _told("dynamic_lora_panel_width")) == 0
        self._scale = torch.empty(self._out_features) if self._dtype in _SCALED else None
        self._bias = None if bias is None else bias.contiguous()
        self.projection = Projection(
            packed=self._packed.data_ptr(),
            scale=None if self._scale is None else self._scale.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            n=self._out_features,
            k=self._in_features,
            format=_FORMATS[self._packed.dtype],
            halves=self._halves,
        )
        self._address = ctypes.byref(self.projection)
        self.replace(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float32 and x.shape[-1] == self._in_features
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self._out_features)
        self._product(self._address, x.data_ptr(), out.data_ptr(), x.numel() // self._in_features)
        return out

    def replace(self, weight: Weight) -> None:
        """Pack another weight into the same memory."""
        self._pack(weight)

    def replace_folded(self, weight: Weight, a: torch.Tensor, b: torch.Tensor) -> None:
        """The same for `weight + b.T @ a`, in one pass; a [rank, in] and b [rank, out], float32."""
        self._pack(weight, a, b)

    def _pack(
        self,
        weight: Weight,
        a: torch.Tensor | None = None,
        b: torch.Tensor | None = None,
    ) -> None:
        """Pack the weight, or `weight + b.T @ a`. Raises MemoryError before anything is packed."""
        scale = [] if self._scale is None else [self._scale.data_ptr()]
        self._pack_to([self._packed.data_ptr(), *scale], weight, a, b)

    def _pack_to(
        self,
        places: list[int | None],
        weight: Weight,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
    ) -> None:
        shape = self._out_features, self._in_features
        parts = [part if part.stride(1) == 1 else part.contiguous() for part in parts_of(weight)]
        assert sum(map(len, parts)) == shape[0] and {p.shape[1] for p in parts} == {shape[1]}
        kept = (_KeptRows * len(parts))(
            *(_KeptRows(p.data_ptr(), p.stride(0), len(p), _KEPT_IN[p.dtype]) for p in parts)
        )
        arguments = [ctypes.POINTER(_KeptRows), *[_POINTER] * len(places), *[_SIZE] * 3]
        factors = [_POINTER, _SIZE, _POINTER, _SIZE, _SIZE]
        pack = allocating(
            load_library("product"), _PACK[self._packed.dtype], [*arguments, *factors]
        )
        if a is None or b is None:
            pack(kept, *places, *shape, self._halves, None, 0, None, 0, 0)
            return
        assert a.dtype == b.dtype == torch.float32 and len(a) == len(b)
        assert (b.shape[1], a.shape[1]) == shape
        assert a.stride(1) == 1 and b.stride(1) == 1, "rows of the factors must be dense"
        factor_rows = (a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), len(a))
        pack(kept, *places, *shape, self._halves, *factor_rows)


class Bfloat16Product(NativeProduct):
    """The same with the weight, and what is merged into it, rounded to bfloat16.

    Sums are float32. Inputs are rounded to bfloat16 where the processor multiplies that faster
    than float32 (AMD's AVX-512-BF16, Intel's matrix unit AMX), and stay as they are elsewhere.
    """

    _dtype = torch.bfloat16


@contextmanager
def whole_inputs() -> Iterator[None]:
    """Has no product of the process round its inputs to fewer than sixteen bits meanwhile.

    For a comparison of two orders of sums: inputs that differ in float32's last place may
    differ in bfloat16's. `Bfloat16Product` takes them as they are; `W8a8Product` adds the
    product of what rounding has left. Lasts until all who asked for it have done. Raises
    NativeUnavailable.
    """
    libraries = [load_library(name) for name in ("product", "layer", "head")]
    switches = [library.dynamic_lora_keep_inputs_whole for library in libraries]
    for switch in switches:
        switch.argtypes = [_SIZE]
        switch.restype = None
        switch(1)
    try:
        yield
    finally:
        for switch in switches:
            switch(-1)


def rounds_inputs() -> bool:
    """Whether `Bfloat16Product` rounds its inputs on this processor. Raises NativeUnavailable."""
    return bool(_told("dynamic_lora_rounds_to_bfloat16"))


class Int8Product(NativeProduct):
    """`(x @ Q.T) * scale + bias`: each output's weights in eight bits, with a scale of its own.

    Q is the weight, and what is merged into it, divided by its row's largest magnitude over 127
    and rounded to nearest. Inputs are rounded to sixteen bits, 256 at a time with a scale, and
    multiplied in integers, exactly; these sums are added in float32. Decoding few
    rows is bound by reading the weights, which are a quarter as large; of many, by
    multiplications, which are half as many. Raises NativeUnavailable where it cannot
    be compiled.
    """

    _dtype = torch.int8

    @property
    def steps(self) -> torch.Tensor:
        """What the weights of each output are multiples of now, [out]: a copy."""
        assert self._scale is not None
        return self._scale.clone()

    def steps_folded(self, weight: Weight, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """What they would be multiples of after `replace_folded`, [out]."""
        found = torch.empty(self._out_features)
        self._pack_to([None, found.data_ptr()], weight, a, b)
        return found


class W8a8Product(Int8Product):
    """The same with inputs rounded to eight bits, 64 at a time with a scale.

    Where the processor has VNNI one instruction multiplies twice as many. With AVX2 alone three
    take the place of four, if neighbouring inputs share the eight bits (`rounds_pairs`). Elsewhere
    it gains nothing, and it does without Intel's matrix unit AMX, which is logged once. Weights are
    kept with 128 added, for one operand of these instructions has no sign. Raises NativeUnavailable
    where it cannot be compiled.
    """

    _dtype = torch.uint8

    def __init__(self, weight: Weight, bias: torch.Tensor | None, *, halves: bool = False) -> None:
        super().__init__(weight, bias, halves=halves)
        if not gains_by_eight_bits():
            _warn_of_no_gain()


@cache
def gains_by_eight_bits() -> bool:
    """Whether `W8a8Product` is the fastest: with VNNI or AVX2, and no AMX.

    Raises NativeUnavailable.
    """
    return bool(_told("dynamic_lora_gains_by_eight_bits"))


@cache
def doubles_by_eight_bits() -> bool:
    """Whether it multiplies twice as fast as others: by VNNI, without AMX beside it.

    Raises NativeUnavailable.
    """
    return bool(_told("dynamic_lora_doubles_by_eight_bits"))


@cache
def rounds_pairs() -> bool:
    """Whether `W8a8Product` has two neighbouring inputs share eight bits: the largest sum of their
    magnitudes becomes 127, in place of the largest magnitude. Raises NativeUnavailable."""
    return bool(_told("dynamic_lora_adds_twos"))


@cache
def _warn_of_no_gain() -> None:
    logger.warning(
        "Inputs in eight bits (w8a8) gain nothing on this processor, which has neither VNNI nor "
        "AVX2, or has AMX, which they do without: prefer int8, which is closer to the model"
    )


def _told(name: str) -> int:
    """What a function without arguments of the library says of it."""
    function = load_library("product")[name]
    function.argtypes = []
    function.restype = _SIZE
    return int(function())


def _panels(library: ctypes.CDLL, outs: int, ins: int, dtype: torch.dtype) -> torch.Tensor:
    width = _told("dynamic_lora_panel_width")
    panel_depth = library.dynamic_lora_panel_depth
    panel_depth.argtypes = [_SIZE, _SIZE]
    panel_depth.restype = _SIZE
    depth = int(panel_depth(_FORMATS[dtype], ins))
    return _ARENA.empty(-(-outs // width) * width * depth, dtype=dtype)
