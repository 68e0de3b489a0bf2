"""The base product `x @ W.T + bias`, in the ways this machine knows.

A weight that is *packed* (blocked for the kernel that reads it) is multiplied
two to three times faster than a plain one when there are few rows, which is
what decoding is: by oneDNN, or faster still by the project's own C++ where a
compiler is at hand. Packing costs a second copy of the weight. Which way is
fastest is measured on the spot.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Protocol

import torch
import torch.nn.functional as F

from dynamic_lora_adapters.native import NativeUnavailable
from dynamic_lora_adapters.native.product import (
    Bfloat16Product,
    Int8Product,
    NativeProduct,
    W8a8Product,
    doubles_by_eight_bits,
)
from dynamic_lora_adapters.weight import Weight, in_one, parts_of

logger = logging.getLogger(__name__)

# The row count that the packed layout is tuned for. Measured on 2 AVX2 cores: 64 is
# best or within noise of the best from 1 to 512 rows.
_ROWS_HINT = 64
_PROBE_ROWS = (1, 8, 32)
_SAMPLES = 5
# How much slower NATIVE may measure where whole layers run in C++, which need its
# products: at 1 and at 32 rows they gained more by that than this.
_NATIVE_LEAD = 1.25


class ProductKind(StrEnum):
    """PLAIN by torch, PACKED by oneDNN, NATIVE by the C++ of `native/`.

    BF16, INT8 and W8A8 are NATIVE with rounded weights, the others compute the same. W8A8 rounds
    the inputs of products to eight bits, too, and adapters' factors, which INT8 does where products
    of eight bits are fast.
    """

    PLAIN = "plain"
    PACKED = "packed"
    NATIVE = "native"
    BF16 = "bf16"
    INT8 = "int8"
    W8A8 = "w8a8"

    @property
    def rounded(self) -> bool:
        """Whether it rounds the weights."""
        return self in (ProductKind.BF16, ProductKind.INT8, ProductKind.W8A8)

    @property
    def factor_dtype(self) -> torch.dtype | None:
        """What adapters' factors are kept in beside rounded weights; None: as the model's.

        Raises NativeUnavailable for INT8 where its C++ cannot be compiled.
        """
        if self is ProductKind.W8A8 or (self is ProductKind.INT8 and doubles_by_eight_bits()):
            return torch.uint8
        return torch.bfloat16 if self.rounded else None


EXACT_KINDS = (ProductKind.PLAIN, ProductKind.PACKED, ProductKind.NATIVE)


class BaseProduct(Protocol):
    """Computes [..., out] from x [..., in]: the base model's linear layer.

    `replace` makes it multiply by another weight [out, in]. `separate` says
    that this leaves the weight it was made from untouched.
    """

    separate: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def replace(self, weight: Weight) -> None: ...


class PlainProduct:
    """`torch.nn.functional.linear` on the weight as it is; replaced in place."""

    separate = False

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)

    def replace(self, weight: Weight) -> None:
        """Overwrite the weight, keeping its memory."""
        parts = parts_of(weight)
        for place, part in zip(self._weight.split([*map(len, parts)]), parts, strict=True):
            place.copy_(part)


class DetachedProduct(PlainProduct):
    """As `PlainProduct`, but replaced by reference: the weight it was made from may be shared."""

    separate = True

    def replace(self, weight: Weight) -> None:
        """Multiply by another weight."""
        self._weight = in_one(weight, self._weight.dtype)


class PackedProduct:
    """oneDNN's inner product on a packed copy of the weight (CPU only).

    These are the operators that `torch.compile` emits for frozen weights.
    Raises RuntimeError, from oneDNN, for a dtype the processor cannot pack.
    """

    separate = True

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._dtype = weight.dtype
        self.replace(weight)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, "none", [], ""
        )
        return out

    def replace(self, weight: Weight) -> None:
        """Pack another weight."""
        whole = in_one(weight, self._dtype).contiguous()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(whole, _ROWS_HINT)


def make_product(
    kind: ProductKind,
    weight: Weight,
    bias: torch.Tensor | None,
    *,
    dtype: torch.dtype | None = None,
    shared: bool = False,
    halves: bool = False,
) -> BaseProduct:
    """The product of a weight [out, in], which is `shared` if others read it too.

    It is of inputs in `dtype`, by default that of the weight. `halves` says that two layers of one
    width are joined in it: C++ lays these out so that, if they are a gate and what it lets
    through, it can activate them while it multiplies.
    """
    if kind is ProductKind.NATIVE:
        return NativeProduct(weight, bias, halves=halves)
    if kind is ProductKind.BF16:
        return Bfloat16Product(weight, bias, halves=halves)
    if kind is ProductKind.INT8:
        return Int8Product(weight, bias, halves=halves)
    if kind is ProductKind.W8A8:
        return W8a8Product(weight, bias, halves=halves)
    whole = in_one(weight, dtype or parts_of(weight)[0].dtype)
    if kind is ProductKind.PACKED:
        return PackedProduct(whole, bias)
    return DetachedProduct(whole, bias) if shared else PlainProduct(whole, bias)


def obstacle(kind: ProductKind, weight: torch.Tensor) -> str | None:
    """Why weights of this device and dtype have no product of a kind here; None if they have."""
    if kind is ProductKind.PLAIN:
        return None
    if weight.device.type != "cpu":
        return f"weights on {weight.device} are not packed"
    if kind is not ProductKind.PACKED and weight.dtype != torch.float32:
        return f"it computes in float32, and the weights are {weight.dtype}"
    try:
        with torch.inference_mode():
            make_product(kind, weight[:1], None)(weight[:1])
    except NativeUnavailable as error:
        return str(error)
    except RuntimeError:
        return f"oneDNN does not pack weights of {weight.dtype} on this processor"
    return None


@torch.inference_mode()
def fastest_kind(
    weight: torch.Tensor, kinds: Sequence[ProductKind], *, whole_layers: bool = False
) -> ProductKind:
    """Whose products of 1, 8 and 32 rows with `weight` [out, in] take the least time in all.

    Measured on the spot, in milliseconds; a sole kind is taken unmeasured. Where
    `whole_layers` may run on its products, NATIVE is taken unless it is clearly slower.
    """
    if len(kinds) == 1:
        return kinds[0]
    inputs = [torch.randn(n, weight.shape[1]).to(weight) for n in _PROBE_ROWS]
    seconds = _seconds({kind: make_product(kind, weight, None) for kind in kinds}, inputs)
    logger.debug("Base products, seconds: %s", seconds)
    best = min(kinds, key=seconds.__getitem__)
    native = seconds.get(ProductKind.NATIVE, math.inf)
    if whole_layers and native <= _NATIVE_LEAD * seconds[best]:
        return ProductKind.NATIVE
    return best


def _seconds(
    products: Mapping[ProductKind, BaseProduct], inputs: list[torch.Tensor]
) -> dict[ProductKind, float]:
    """In turns, so that all have had the same; of each the least of several runs: what disturbs
    a measurement only ever adds to it."""

    def once(product: BaseProduct, x: torch.Tensor) -> float:
        begin = time.perf_counter()
        product(x)
        return time.perf_counter() - begin

    rounds = [
        {kind: [once(product, x) for x in inputs] for kind, product in products.items()}
        for _ in range(_SAMPLES)
    ]
    return {
        kind: sum(min(times) for times in zip(*(one[kind] for one in rounds), strict=True))
        for kind in products
    }
