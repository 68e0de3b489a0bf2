import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM, PreTrainedModel

from dynamic_lora_adapters.apply.row_axes import watching_rows
from dynamic_lora_adapters.geometry import RowAxes
from tests.support.geometry import geometry_of
from tests.support.models import TINY_MODELS, TINY_MOE_MODELS


def tiny_phi() -> PreTrainedModel:
    config = PhiConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        qk_layernorm=True,
    )
    model: PreTrainedModel = PhiForCausalLM(config)
    return model


NORMS = [
    ("llama", "model.norm", 1),
    ("gemma3_text", "model.layers.0.input_layernorm", 1),
    ("gemma3_text", "model.layers.0.self_attn.q_norm", 2),
    ("gemma3_text", "model.layers.1.self_attn.k_norm", 2),
    ("qwen3", "model.layers.0.self_attn.q_norm", 1),
    ("olmo2", "model.layers.0.self_attn.k_norm", 1),
    ("phi", "model.layers.0.self_attn.q_layernorm", 2),
]


@pytest.mark.parametrize(("family", "path", "axis"), NORMS)
def test_norms_before_and_behind_a_transpose(family: str, path: str, axis: int) -> None:
    model = tiny_phi() if family == "phi" else TINY_MODELS[family]()
    assert geometry_of(model).rows[path] == RowAxes((axis,), (axis,))


def test_routers_and_experts() -> None:
    rows = geometry_of(TINY_MOE_MODELS["qwen3_moe"]()).rows
    router = rows["model.layers.0.mlp.gate"]
    assert set(router.outputs) == {0}
    experts = rows["model.layers.0.mlp.experts"]
    assert (experts.outputs, experts.args) == ((0,), (0, 0, 0))


@pytest.mark.parametrize("num_tokens", [4, 64])
def test_what_cannot_be_told_is_left_out(num_tokens: int) -> None:
    """As many tokens as there are heads, or values in a row."""
    model = TINY_MODELS["gemma3_text"]()
    with watching_rows(model) as rows:
        model(input_ids=torch.arange(num_tokens)[None])
    path = {4: "model.layers.0.self_attn.q_norm", 64: "model.norm"}[num_tokens]
    assert path not in rows


def test_what_was_not_called_or_called_in_two_ways_is_left_out() -> None:
    model = TINY_MODELS["llama"]()
    with watching_rows(model) as rows:
        model.get_input_embeddings()(torch.arange(19))
        norms = [model.get_submodule(f"model.layers.{i}.input_layernorm") for i in range(2)]
        norms[0](torch.zeros(19, 64))
        norms[1](torch.zeros(19, 64))
        norms[1](torch.zeros(1, 19, 64))
    assert rows["model.layers.0.input_layernorm"] == RowAxes((0,), (0,))
    assert "model.layers.1.input_layernorm" not in rows
    assert "model.norm" not in rows
