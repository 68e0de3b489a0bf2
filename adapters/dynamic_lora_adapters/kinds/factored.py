"""Kinds that come down to exact low-rank factors: VeRA, LoHa and LoKr."""

from typing import TYPE_CHECKING, Any

from dynamic_lora_adapters.kinds.folded import PristineLinears, added_delta, finite_delta
from dynamic_lora_adapters.kinds.replica import ADAPTER
from dynamic_lora_adapters.terms import LinearTerms

if TYPE_CHECKING:
    import torch


def vera_terms(path: str, layer: Any, linears: PristineLinears) -> LinearTerms:
    """VeRA (Kopiczko et al. 2023): shared projections between two trained vectors."""
    del linears
    shared_a = layer.vera_A[ADAPTER][:, : layer.in_features]
    shared_b = layer.vera_B[ADAPTER][: layer.out_features]
    a = layer.vera_lambda_d[ADAPTER].detach()[:, None] * shared_a
    b = layer.vera_lambda_b[ADAPTER].detach()[:, None] * shared_b
    return _low_rank(path, a, b, rank=a.shape[0], scaling=1.0)


def loha_terms(path: str, layer: Any, linears: PristineLinears) -> LinearTerms:
    """LoHa (Hyeon-Woo et al. 2021): the elementwise product of two low-rank products.

    It has rank r² at most, with the column-wise Khatri-Rao products of the
    factors; where that is no gain, the delta is kept dense.
    """
    rank, scaling = layer.r[ADAPTER], layer.scaling[ADAPTER]
    if rank * rank >= _break_even(layer):
        return _with_config(added_delta(path, layer, linears), rank, scaling)
    left = [getattr(layer, name)[ADAPTER].detach() for name in ("hada_w1_a", "hada_w2_a")]
    right = [getattr(layer, name)[ADAPTER].detach() for name in ("hada_w1_b", "hada_w2_b")]
    b = (left[0][:, :, None] * left[1][:, None, :]).flatten(1)
    a = (right[0][:, None, :] * right[1][None, :, :]).flatten(0, 1)
    return _low_rank(path, a, b * scaling, rank=rank, scaling=scaling)


def lokr_terms(path: str, layer: Any, linears: PristineLinears) -> LinearTerms:
    """LoKr (Yeh et al. 2023): the Kronecker product of two small matrices.

    With each as a product P Q, it is (P1 x P2) (Q1 x Q2); kept dense where that
    is no gain.
    """
    rank, scaling = layer.r[ADAPTER], layer.scaling[ADAPTER]
    (left_b, left_a), (right_b, right_a) = _split(layer, "lokr_w1"), _split(layer, "lokr_w2")
    if left_a.shape[0] * right_a.shape[0] >= _break_even(layer):
        return _with_config(added_delta(path, layer, linears), rank, scaling)
    a, b = _kron(left_a, right_a), _kron(left_b, right_b)
    return _low_rank(path, a, b * scaling, rank=rank, scaling=scaling)


def _break_even(layer: Any) -> float:
    # Two factors of this rank hold as many numbers as a square matrix.
    out_features, in_features = layer.get_base_layer().weight.shape
    return float(min(in_features, out_features)) / 2


def _split(layer: Any, name: str) -> "tuple[torch.Tensor, torch.Tensor]":
    """One Kronecker factor as a product (P, Q), the identity standing in for a side."""
    import torch

    whole = getattr(layer, name)
    if ADAPTER not in whole:
        parts = (getattr(layer, f"{name}_{side}")[ADAPTER].detach() for side in "ab")
        return next(parts), next(parts)
    matrix = whole[ADAPTER].detach()
    rows, columns = matrix.shape
    if rows < columns:
        return torch.eye(rows), matrix
    return matrix, torch.eye(columns)


def _kron(left: "torch.Tensor", right: "torch.Tensor") -> "torch.Tensor":
    import torch

    return torch.kron(left.contiguous(), right.contiguous())


def _with_config(terms: LinearTerms, rank: int, scaling: float) -> LinearTerms:
    return LinearTerms(dense=terms.dense, rank=rank, scaling=scaling)


def _low_rank(
    path: str, a: "torch.Tensor", b: "torch.Tensor", *, rank: int, scaling: float
) -> LinearTerms:
    return LinearTerms(a=finite_delta(path, a), b=finite_delta(path, b), rank=rank, scaling=scaling)
