"""What an adapter does to a base model, whatever kind of adapter it is.

Every kind that is served comes down to a few *terms*. On a linear layer
`y = W x + bias` (W of shape [out, in]) an adapter adds

    scale * (W x)  +  b (a x)  +  dense x  +  bias'

each term optional. All are linear in the adapter, so that a weighted sum of
adapters is the weighted sum of their terms, and all but `bias'` can be folded
into W. What is no linear layer is an embedding, or a module that is replaced.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LinearTerms:
    """Terms on one linear layer, in fp32 on the CPU.

    Shapes: `a` [rank, in], `b` [out, rank] with the scaling folded in, `scale`
    [out] (0 changes nothing), `dense` [out, in], `bias` [out]. `a` and `b` come
    together. `rank` and `scaling` are what the adapter's config says of this
    layer, for display; 0 where there are no factors. `dense` alone may be in another dtype.
    """

    a: "torch.Tensor | None" = None
    b: "torch.Tensor | None" = None
    scale: "torch.Tensor | None" = None
    dense: "torch.Tensor | None" = None
    bias: "torch.Tensor | None" = None
    rank: int = 0
    scaling: float = 0.0


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class EmbeddingTerms:
    """Terms on an embedding table [vocab, dim], in fp32 on the CPU.

    The row of token t gets `b @ a[:, t]` added, and if t is `token_ids[i]`,
    `rows[i]`. Shapes: `a` [rank, vocab], `b` [dim, rank] with the scaling
    folded in, `token_ids` [n] (int64, each once), `rows` [n, dim]. A factor that the
    model puts on its embeddings (Gemma) applies to these too.
    """

    a: "torch.Tensor | None" = None
    b: "torch.Tensor | None" = None
    token_ids: "torch.Tensor | None" = None
    rows: "torch.Tensor | None" = None
    rank: int = 0
    scaling: float = 0.0


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ModuleOverride:
    """Replaces parameters of a module that works row by row (a norm, a router, experts).

    `parameters` maps the parameter's name below the module (`weight`,
    `gate_up_proj`) to its full new value.
    """

    parameters: "Mapping[str, torch.Tensor]"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PromptTerms:
    """Virtual tokens before a prompt.

    Either their embeddings `embeddings` [num_tokens, hidden] (prompt tuning,
    Lester et al. 2021), or their keys and values for each layer (prefix
    tuning, Li & Liang 2021): `keys` and `values`, one [num_tokens, kv_heads,
    head_dim] a layer.
    """

    num_tokens: int
    embeddings: "torch.Tensor | None" = None
    keys: "tuple[torch.Tensor, ...]" = ()
    values: "tuple[torch.Tensor, ...]" = ()


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AdapterTerms:
    """All that an adapter does, by module path below the causal LM.

    `linears` may name the output head. `invocation_ids` are the tokens from
    which on the adapter acts (aLoRA, Greenewald et al. 2025); empty: always.
    """

    linears: Mapping[str, LinearTerms] = field(default_factory=dict)
    embeddings: Mapping[str, EmbeddingTerms] = field(default_factory=dict)
    overrides: Mapping[str, ModuleOverride] = field(default_factory=dict)
    prompt: PromptTerms | None = None
    invocation_ids: tuple[int, ...] = ()
