"""What an adapter does to single rows besides terms on linear layers.

Embeddings that it changes, modules that it replaces, and virtual tokens that
it puts before a prompt: all of them act on the rows of the requests that use
the adapter, and are therefore free to differ within one batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dynamic_lora_adapters.terms import AdapterTerms, EmbeddingTerms, PromptTerms
from dynamic_lora_adapters.value_range import balanced


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingDelta:
    """`EmbeddingTerms` on the device.

    Shapes: a [vocab, rank], b [rank, dim], token_ids [n] in ascending order,
    rows [n, dim].
    """

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    @classmethod
    def of(
        cls, terms: EmbeddingTerms, *, device: torch.device, dtype: torch.dtype
    ) -> "EmbeddingDelta":
        """Bring the terms to the device."""
        a = b = token_ids = rows = None
        if terms.a is not None and terms.b is not None:
            a, b = terms.a, terms.b.T
            if dtype == torch.float16:
                a, b = balanced(a, b)
            a, b = _brought(a.T, device, dtype), _brought(b, device, dtype)
        if terms.rows is not None and terms.token_ids is not None:
            token_ids, order = terms.token_ids.sort()
            token_ids, rows = token_ids.to(device), terms.rows[order].to(device, dtype)
        return cls(a, b, token_ids, rows)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor | None:
        """What to add to the embeddings of `token_ids` [n], shape [n, dim]; None for nothing."""
        delta = None
        if self.a is not None and self.b is not None:
            delta = self.a[token_ids] @ self.b
        if self.token_ids is not None and self.rows is not None and len(self.rows):
            place = torch.searchsorted(self.token_ids, token_ids).clamp_(max=len(self.rows) - 1)
            known = self.token_ids[place] == token_ids
            rows = torch.where(known[:, None], self.rows[place], 0)
            delta = rows if delta is None else delta + rows
        return delta


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RowTerms:
    """Everything of an adapter that acts on its own rows, on the device, by module path."""

    embeddings: Mapping[str, EmbeddingDelta]
    overrides: Mapping[str, Mapping[str, torch.Tensor]]
    prompt: PromptTerms | None

    @classmethod
    def of(
        cls, terms: AdapterTerms, *, device: torch.device, dtype: torch.dtype
    ) -> "RowTerms | None":
        """The row terms of an adapter, or None if it has none."""
        if not (terms.embeddings or terms.overrides or terms.prompt):
            return None
        embeddings = {
            path: EmbeddingDelta.of(delta, device=device, dtype=dtype)
            for path, delta in terms.embeddings.items()
        }
        overrides = {
            path: {name: _brought(one, device, dtype) for name, one in module.parameters.items()}
            for path, module in terms.overrides.items()
        }
        prompt = None if terms.prompt is None else _prompt_on(terms.prompt, device, dtype)
        return cls(embeddings=embeddings, overrides=overrides, prompt=prompt)


@dataclass(frozen=True, slots=True, eq=False)
class RowSegment:
    """Consecutive rows of a batch that `terms` act on; `position` is the first one's."""

    terms: RowTerms
    rows: slice
    position: int


def _prompt_on(prompt: PromptTerms, device: torch.device, dtype: torch.dtype) -> PromptTerms:
    return PromptTerms(
        num_tokens=prompt.num_tokens,
        embeddings=(
            None if prompt.embeddings is None else _brought(prompt.embeddings, device, dtype)
        ),
        keys=tuple(_brought(key, device, dtype) for key in prompt.keys),
        values=tuple(_brought(value, device, dtype) for value in prompt.values),
    )


def _brought(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A copy, also where nothing changes: what was read may be a view of a file."""
    return tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)


def row_bytes(terms: AdapterTerms, dtype: torch.dtype) -> int:
    """What the `RowTerms` of an adapter take in `dtype`, in bytes."""
    deltas = terms.embeddings.values()
    tensors = [tensor for one in deltas for tensor in (one.a, one.b, one.rows)]
    tensors += [
        value for module in terms.overrides.values() for value in module.parameters.values()
    ]
    if (prompt := terms.prompt) is not None:
        tensors += [prompt.embeddings, *prompt.keys, *prompt.values]
    num_values = sum(tensor.numel() for tensor in tensors if tensor is not None)
    ids = (one.token_ids for one in deltas if one.rows is not None)
    return num_values * dtype.itemsize + sum(one.nbytes for one in ids if one is not None)
