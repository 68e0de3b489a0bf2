"""The base model's own parameters, for adapters that are read against them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from dynamic_lora_adapters.geometry import LinearShape

if TYPE_CHECKING:
    import torch


class BaseWeights(Protocol):
    """Gives out parameters of the base model as they were before any adapter."""

    def parameter(self, name: str, rows: Sequence[int] | None = None) -> "torch.Tensor":
        """The pristine value of a parameter, or of these rows, in fp32 on the CPU.

        Raises KeyError.
        """
        ...


class ModelWeights:
    """`BaseWeights` of a transformers model whose parameters nobody has changed.

    Parameters that share their memory are known by each of their names.
    """

    def __init__(self, model: "torch.nn.Module") -> None:
        self._model = model

    def parameter(self, name: str, rows: Sequence[int] | None = None) -> "torch.Tensor":
        """The parameter's present value, or that of rows, in fp32 on the CPU; raises KeyError."""
        import torch

        path, _, leaf = name.rpartition(".")
        try:
            value = getattr(self._model.get_submodule(path), leaf)
        except AttributeError:
            raise KeyError(name) from None
        if not isinstance(value, torch.Tensor):
            raise KeyError(name)
        value = value.detach()
        # Chosen first: a table in fewer bits is widened as a copy.
        return (value if rows is None else value[list(rows)]).to("cpu", torch.float32)


def linear_weight(base: BaseWeights, path: str, shape: LinearShape) -> "torch.Tensor":
    """The weight of a linear layer as [out_features, in_features]."""
    weight = base.parameter(f"{path}.weight")
    return weight.T if shape.transposed else weight


class NoWeights:
    """`BaseWeights` where nobody gave any: asking for one is an error of the program."""

    def parameter(self, name: str, rows: Sequence[int] | None = None) -> "torch.Tensor":
        """Raises ValueError."""
        which = name if rows is None else f"{name}, rows {list(rows)}"
        raise ValueError(f"this adapter is read against the base model's {which!r}: pass base=...")
