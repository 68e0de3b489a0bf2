"""An adapter's terms put into a model by hand: what they mean, written out once more."""

import copy
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dynamic_lora_adapters.terms import AdapterTerms, EmbeddingTerms, LinearTerms, PromptTerms


def apply(model: PreTrainedModel, terms: AdapterTerms) -> PreTrainedModel:
    """A copy of `model` with all but the prompt of `terms` folded into its parameters."""
    changed = copy.deepcopy(model)
    _untie(changed)
    with torch.no_grad():
        for path, linear in terms.linears.items():
            _change_linear(changed.get_submodule(path), linear)
        for path, embedding in terms.embeddings.items():
            _change_embedding(changed.get_submodule(path), embedding)
        for path, override in terms.overrides.items():
            module = changed.get_submodule(path)
            for name, value in override.parameters.items():
                parameter = module.get_parameter(name)
                assert parameter.shape == value.shape
                parameter.copy_(value)
    return changed


def logits(model: PreTrainedModel, terms: AdapterTerms, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocab] of the prompt `input_ids` [tokens] under `terms`."""
    changed: Any = apply(model, terms)
    with torch.no_grad():
        if terms.prompt is None:
            return _only(changed(input_ids=input_ids[None]).logits)
        if terms.prompt.embeddings is not None:
            embed: Any = changed.get_input_embeddings()
            embedded = embed(input_ids[None])
            inputs = torch.cat([terms.prompt.embeddings[None], embedded], dim=1)
            return _only(changed(inputs_embeds=inputs).logits)[terms.prompt.num_tokens :]
        cache = _cache(changed, terms.prompt)
        return _only(changed(input_ids=input_ids[None], past_key_values=cache).logits)


def linear_delta(terms: LinearTerms, weight: torch.Tensor) -> torch.Tensor:
    """What the terms add to a weight of shape [out, in]."""
    delta = torch.zeros_like(weight)
    if terms.a is not None and terms.b is not None:
        delta += terms.b @ terms.a
    if terms.scale is not None:
        delta += terms.scale[:, None] * weight
    if terms.dense is not None:
        delta += terms.dense
    return delta


def _only(batch: torch.Tensor) -> torch.Tensor:
    assert len(batch) == 1
    return batch[0]


def _untie(model: Any) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _change_linear(module: torch.nn.Module, terms: LinearTerms) -> None:
    weight = module.get_parameter("weight")
    if isinstance(module, Conv1D):
        weight.add_(linear_delta(terms, weight.T.contiguous()).T)
    else:
        weight.add_(linear_delta(terms, weight))
    if terms.bias is None:
        return
    if module.bias is None:
        module.bias = torch.nn.Parameter(torch.zeros_like(terms.bias), requires_grad=False)
    module.get_parameter("bias").add_(terms.bias)


def _change_embedding(module: torch.nn.Module, terms: EmbeddingTerms) -> None:
    weight = module.get_parameter("weight")
    if terms.a is not None and terms.b is not None:
        weight.add_((terms.b @ terms.a).T)
    if terms.token_ids is not None and terms.rows is not None:
        weight.index_add_(0, terms.token_ids, terms.rows)


def _cache(model: PreTrainedModel, prompt: PromptTerms) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(zip(prompt.keys, prompt.values, strict=True)):
        # From [tokens, heads, head_dim] to the cache's [1, heads, tokens, head_dim].
        cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], layer)
    return cache
