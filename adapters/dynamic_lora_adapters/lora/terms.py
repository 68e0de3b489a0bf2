"""The terms of one LoRA layer, from its tensors and the base's."""

import dataclasses
from typing import TYPE_CHECKING

from dynamic_lora_adapters.base_weights import BaseWeights, linear_weight
from dynamic_lora_adapters.errors import InvalidAdapter
from dynamic_lora_adapters.geometry import BaseGeometry
from dynamic_lora_adapters.lora.checkpoint import Checkpoint, Part
from dynamic_lora_adapters.lora.dora import dora_embedding, dora_terms
from dynamic_lora_adapters.lora.replaced import Changes
from dynamic_lora_adapters.lora.spec import LoraSpec
from dynamic_lora_adapters.lora.targets import Target
from dynamic_lora_adapters.terms import EmbeddingTerms, LinearTerms

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoraReader:
    """What reading a layer takes. `changes` are the base's parameters that are replaced too."""

    spec: LoraSpec
    geometry: BaseGeometry
    base: BaseWeights
    checkpoint: Checkpoint
    changes: Changes

    def linear(self, target: Target) -> LinearTerms:
        """Terms of an adapted linear layer or output head, the layer's changes included."""
        shape = self.geometry.linear(target.path)
        assert shape is not None
        a = self.checkpoint.take(target.path, Part.A, (target.rank, shape.in_features), rank_axis=0)
        b = self.checkpoint.take(
            target.path,
            Part.B,
            (shape.out_features, target.rank),
            rank_axis=1,
            factor=target.scaling,
        )
        plain = LinearTerms(
            a=a,
            b=b,
            dense=self.changes.dense.get(target.path),
            bias=self._bias(target, shape.out_features),
            rank=target.rank,
            scaling=target.scaling,
        )
        if self.spec.use_velora:
            self.checkpoint.skip(target.path, Part.VELORA)
        if not self.spec.use_dora:
            return plain
        weight = linear_weight(self.base, target.path, shape)
        terms = dora_terms(plain, weight, self._magnitude(target, shape.out_features))
        self._check_norms(target, terms.scale)
        return terms

    def embedding(self, target: Target) -> EmbeddingTerms:
        """Terms of an adapted token embedding, its replaced rows included."""
        shape = self.geometry.embeddings[target.path]
        for key, used in self._for_linears_alone().items():
            if used:
                raise InvalidAdapter(
                    f"{key} cannot go together with the token embedding {target.path!r}: "
                    "PEFT has no such adapter.",
                    field="target_modules",
                )
        a = self.checkpoint.take(
            target.path, Part.EMBEDDING_A, (target.rank, shape.num_tokens), rank_axis=0
        )
        b = self.checkpoint.take(
            target.path,
            Part.EMBEDDING_B,
            (shape.dim, target.rank),
            rank_axis=1,
            factor=target.scaling,
        )
        token_ids, rows = self.changes.rows.get(target.path, (None, None))
        plain = EmbeddingTerms(
            a=a, b=b, token_ids=token_ids, rows=rows, rank=target.rank, scaling=target.scaling
        )
        if not self.spec.use_dora:
            return plain
        table = self.base.parameter(f"{target.path}.weight")
        terms = dora_embedding(plain, table, self._magnitude(target, shape.dim))
        self._check_norms(target, terms.rows)
        return terms

    def _for_linears_alone(self) -> dict[str, bool]:
        return {
            "lora_bias": self.spec.lora_bias,
            "alora_invocation_tokens": bool(self.spec.invocation_ids),
            "velora_config": self.spec.use_velora,
        }

    def _bias(self, target: Target, width: int) -> "torch.Tensor | None":
        changed = self.changes.bias.get(target.path)
        if not self.spec.lora_bias:
            return changed
        own = self.checkpoint.take(target.path, Part.B_BIAS, (width,), factor=target.scaling)
        return own if changed is None else own + changed

    def _magnitude(self, target: Target, width: int) -> "torch.Tensor":
        return self.checkpoint.take(target.path, Part.MAGNITUDE, (width,))

    def _check_norms(self, target: Target, quotients: "torch.Tensor | None") -> None:
        assert quotients is not None
        if not bool(quotients.isfinite().all()):
            name = self.checkpoint.name(target.path, Part.MAGNITUDE)
            raise InvalidAdapter(
                f"The magnitudes {name!r} are for rows of {target.path!r} whose norm is zero.",
                field=name,
            )
