"""The base product `x @ W.T + bias`, from a plain or a packed weight.

oneDNN multiplies by a weight it has *packed* (blocked for its kernels) two to
three times faster than by a plain one when there are few rows, which is what
decoding is. Packing costs a second copy of the weight, so it is done only
where a measurement on the spot says that it pays.
"""

import time
from typing import Protocol

import torch
import torch.nn.functional as F

# The row count that the packed layout is tuned for. Measured on 2 AVX2 cores: 64 is
# best or within noise of the best from 1 to 512 rows.
_ROWS_HINT = 64
_PROBE_ROWS = (1, 8, 32)
_SAMPLES = 5


class BaseProduct(Protocol):
    """Computes [..., out] from x [..., in]: the base model's linear layer.

    `replace` makes it multiply by another weight [out, in]. `separate` says
    that this leaves the weight it was made from untouched.
    """

    separate: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def replace(self, weight: torch.Tensor) -> None: ...


class PlainProduct:
    """`torch.nn.functional.linear` on the weight as it is; replaced in place."""

    separate = False

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)

    def replace(self, weight: torch.Tensor) -> None:
        """Overwrite the weight, keeping its memory."""
        self._weight.copy_(weight)


class DetachedProduct(PlainProduct):
    """As `PlainProduct`, but replaced by reference: the weight it was made from may be shared."""

    separate = True

    def replace(self, weight: torch.Tensor) -> None:
        """Multiply by another weight."""
        self._weight = weight


class PackedProduct:
    """oneDNN's inner product on a packed copy of the weight (CPU only).

    These are the operators that `torch.compile` emits for frozen weights.
    Raises RuntimeError, from oneDNN, for a dtype the processor cannot pack.
    """

    separate = True

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.replace(weight)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, "none", [], ""
        )
        return out

    def replace(self, weight: torch.Tensor) -> None:
        """Pack another weight."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)


@torch.inference_mode()
def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN packs a weight of this device and dtype, on this processor."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    try:
        PackedProduct(weight, None)(weight[:1])
    except RuntimeError:
        return False
    return True


@torch.inference_mode()
def packing_pays(weight: torch.Tensor) -> bool:
    """Whether products of 1, 8 and 32 rows with `weight` [out, in] are faster packed.

    Measured on the spot, in milliseconds. Raises RuntimeError if it cannot be packed.
    """
    plain, packed = PlainProduct(weight, None), PackedProduct(weight, None)
    inputs = [torch.randn(n, weight.shape[1]).to(weight.dtype) for n in _PROBE_ROWS]
    return _seconds(packed, inputs) < _seconds(plain, inputs)


def _seconds(product: BaseProduct, inputs: list[torch.Tensor]) -> float:
    """The least of several runs: what disturbs a measurement only ever adds to it."""

    def once(x: torch.Tensor) -> float:
        begin = time.perf_counter()
        product(x)
        return time.perf_counter() - begin

    return sum(min(once(x) for _ in range(_SAMPLES)) for x in inputs)
