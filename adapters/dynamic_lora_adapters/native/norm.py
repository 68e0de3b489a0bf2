"""RMSNorm in C++, in the place of the handful of operators that models write it with."""

import ctypes
import logging

import torch
from torch import nn

from dynamic_lora_adapters.native.library import NativeUnavailable, load_library

logger = logging.getLogger(__name__)

_POINTER = ctypes.c_void_p
_EPSILONS = ("variance_epsilon", "eps")
_OFFSETS = (0.0, 1.0)  # Gemma stores weights as what they differ from 1 by
_TOLERANCE = 1e-5


class NativeRmsNorm:
    """`x / sqrt(mean(x^2) + eps) * (module.weight + offset)` in float32 on a CPU.

    A call reads the weight that the module has then; a layer in C++ keeps the
    one it was made with. Raises NativeUnavailable where it cannot be compiled.
    """

    def __init__(self, module: nn.Module, eps: float, offset: float) -> None:
        self._module = module
        self.eps = eps
        self.offset = offset
        self._norm = load_library("norm").dynamic_lora_rms_norm
        size = ctypes.c_int64
        self._norm.argtypes = [*[_POINTER] * 3, size, size, ctypes.c_float, ctypes.c_float]
        self._norm.restype = None

    @property
    def weight(self) -> torch.Tensor:
        """The module's weight [dim] as it is now."""
        weight = self._module.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.contiguous()
        out = torch.empty_like(x)
        dim = x.shape[-1]
        weight = self.weight
        assert x.dtype == weight.dtype == torch.float32 and weight.shape == (dim,)
        self._norm(
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // dim,
            dim,
            self.eps,
            self.offset,
        )
        return out


class NormParts(ctypes.Structure):
    """What `norm.h` calls Norm: the address of a norm's weight, and its two numbers."""

    _fields_ = [("weight", _POINTER), ("eps", ctypes.c_float), ("offset", ctypes.c_float)]

    @classmethod
    def of(cls, norm: NativeRmsNorm | None) -> "NormParts":
        """The parts of a norm, which must live on; of None, that there is none."""
        if norm is None:
            return cls(weight=None, eps=0.0, offset=0.0)
        return cls(weight=norm.weight.data_ptr(), eps=norm.eps, offset=norm.offset)


@torch.inference_mode()
def adopt_native_norms(model: nn.Module) -> int:
    """Let every RMSNorm of the model run in C++ that is proved to compute the same; how many.

    A norm is known by its class's name and one weight, and is left as it is
    unless a probe gives the same numbers.
    """
    adopted = 0
    try:
        for module in model.modules():
            if (norm := _equal_norm(module)) is not None:
                module.forward = norm
                adopted += 1
    except NativeUnavailable as reason:
        logger.info("Norms are the model's own: %s", reason)
    return adopted


def _equal_norm(module: nn.Module) -> NativeRmsNorm | None:
    eps = next((getattr(module, name) for name in _EPSILONS if hasattr(module, name)), None)
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float):
        return None
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1:
        return None
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or len([*module.buffers()]):
        return None
    probe = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0))
    expected = module(probe)
    for offset in _OFFSETS:
        norm = NativeRmsNorm(module, eps, offset)
        if torch.allclose(norm(probe), expected, rtol=_TOLERANCE, atol=_TOLERANCE):
            return norm
    return None
