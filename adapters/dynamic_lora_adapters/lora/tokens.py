"""Trained rows of the token embedding (PEFT's `trainable_token_indices`)."""

from typing import TYPE_CHECKING

from dynamic_lora_adapters.base_weights import BaseWeights
from dynamic_lora_adapters.errors import IncompatibleAdapter, InvalidAdapter, UnsupportedAdapter
from dynamic_lora_adapters.geometry import BaseGeometry
from dynamic_lora_adapters.lora.checkpoint import Checkpoint, Part
from dynamic_lora_adapters.lora.spec import LoraSpec
from dynamic_lora_adapters.terms import EmbeddingTerms, LinearTerms

if TYPE_CHECKING:
    import torch

_KEY = "trainable_token_indices"
Rows = dict[str, "tuple[torch.Tensor, torch.Tensor]"]


def read_token_rows(
    spec: LoraSpec, checkpoint: Checkpoint, geometry: BaseGeometry, base: BaseWeights
) -> Rows:
    """Token ids [n] and differences of their rows [n, dim], by path of embedding or head.

    PEFT saves the new rows, not the differences. Where the head shares the
    embedding's weight it follows the embedding, unless it has other tokens of
    its own; the file may hold its rows once more. Raises `InvalidAdapter` if these differ.
    """
    import torch

    layers = _layers(spec, geometry)
    followers = _followers(layers, geometry)
    rows: Rows = {}
    for path, ids in layers.items():
        if path not in followers:
            name = f"{path}.weight"
            num_tokens, dim = geometry.parameters[name]
            token_ids = _token_ids(path, ids, num_tokens)
            new = checkpoint.take(path, Part.TOKENS, (len(ids), dim))
            rows[path] = (torch.tensor(token_ids), new - base.parameter(name, token_ids))
    for path, source in followers.items():
        rows[path] = rows[source]
        if checkpoint.has(path, Part.TOKENS):
            _check_follower(path, source, checkpoint, rows[source][1].shape)
    for path in rows:
        _check_head(path, geometry)
    return rows


def embedding_rows(
    token_ids: "torch.Tensor",
    rows: "torch.Tensor",
    others: "tuple[torch.Tensor, torch.Tensor] | None" = None,
) -> EmbeddingTerms:
    """Row differences as terms of the embedding.

    `others`: token ids and row differences that count for tokens not in `token_ids`.
    """
    import torch

    if others is not None:
        kept = ~torch.isin(others[0], token_ids)
        token_ids = torch.cat([token_ids, others[0][kept]])
        rows = torch.cat([rows, others[1][kept]])
    return EmbeddingTerms(token_ids=token_ids, rows=rows)


def head_rows(token_ids: "torch.Tensor", rows: "torch.Tensor", num_tokens: int) -> LinearTerms:
    """Row differences of the output head as factors, `a` the rows and `b` one-hot.

    As a dense delta where so many rows change that factors would take more.
    """
    import torch

    dim = rows.shape[1]
    if len(token_ids) * (num_tokens + dim) > num_tokens * dim:
        return LinearTerms(dense=torch.zeros(num_tokens, dim).index_copy_(0, token_ids, rows))
    b = torch.zeros(num_tokens, len(token_ids))
    b[token_ids, torch.arange(len(token_ids))] = 1.0
    return LinearTerms(a=rows.contiguous(), b=b)


def _layers(spec: LoraSpec, geometry: BaseGeometry) -> dict[str, tuple[int, ...]]:
    """Token ids by module path. PEFT matches the end of the path, even within a name."""
    layers = {}
    for name, ids in spec.trainable_token_indices:
        paths = [p for p in geometry.modules if p.endswith(name)] if name else geometry.embeddings
        if not paths:
            raise InvalidAdapter(
                f"{_KEY} names {name!r}, which the base does not have.", field=_KEY
            )
        for path in paths:
            if path not in geometry.embeddings and path not in geometry.heads:
                raise UnsupportedAdapter(
                    f"{_KEY} names {path!r} ({geometry.modules[path]}), "
                    "which is neither the token embedding nor the output head.",
                    field=_KEY,
                )
            layers[path] = ids
    return layers


def _followers(layers: dict[str, tuple[int, ...]], geometry: BaseGeometry) -> dict[str, str]:
    sources = [path for path in geometry.embeddings if path in layers]
    if not geometry.tied or not sources:
        return {}
    source = sources[0]
    return {
        head: source
        for head in geometry.heads
        if layers.get(head, layers[source]) == layers[source]
    }


def _check_follower(path: str, source: str, checkpoint: Checkpoint, shape: tuple[int, ...]) -> None:
    own, other = (checkpoint.take(p, Part.TOKENS, shape) for p in (path, source))
    if not own.equal(other):
        raise InvalidAdapter(
            f"The trained rows of {source!r} and {path!r} differ; the base model has one weight "
            "for both.",
            field=checkpoint.name(path, Part.TOKENS),
        )


def _token_ids(path: str, ids: tuple[int, ...], num_tokens: int) -> list[int]:
    if max(ids) >= num_tokens:
        raise IncompatibleAdapter(
            f"{_KEY} names token {max(ids)}; {path!r} of the base model has {num_tokens}.",
            field=_KEY,
        )
    return list(ids)


def _check_head(path: str, geometry: BaseGeometry) -> None:
    if path in geometry.heads and f"{path}.bias" in geometry.parameters:
        raise UnsupportedAdapter(
            f"{_KEY} changes {path!r}, which has a bias that PEFT would leave out.", field=_KEY
        )
