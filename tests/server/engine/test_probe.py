from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    MixtralConfig,
    Olmo2Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from dynamic_lora_server.engine.probe import adopt_attention, settle_attention
from dynamic_lora_server.errors import UnsupportedModel
from tests.support.models import TINY_MODELS, tiny_falcon, tiny_llama

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
EXPERTS: dict[str, Any] = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
MORE: dict[str, PreTrainedConfig] = {
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "olmo2": Olmo2Config(**SIZES, num_key_value_heads=2),
    "granite": GraniteConfig(**SIZES, num_key_value_heads=2),
    "phi": PhiConfig(**SIZES),
    "mixtral": MixtralConfig(**SIZES, **EXPERTS, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, moe_intermediate_size=32),
    # Attention sinks, beside sliding windows.
    "gpt_oss": GptOssConfig(
        **SIZES,
        **EXPERTS,
        num_local_experts=4,
        head_dim=16,
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}


@pytest.mark.parametrize("family", TINY_MODELS)
def test_architectures_pass(family: str) -> None:
    layers = adopt_attention(TINY_MODELS[family]())
    assert len(layers) == 2
    assert {layer.key_dim for layer in layers} == {16}


@pytest.mark.parametrize("family", MORE)
def test_more_architectures_pass(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MORE[family])
    model.eval()
    assert len(adopt_attention(model)) == 2


def test_a_model_that_bypasses_the_interface_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match=r"FalconForCausalLM .*AttentionInterface"):
        adopt_attention(tiny_falcon())


def test_a_model_whose_packed_logits_differ_is_refused() -> None:
    model = tiny_llama()
    embedding = model.model.embed_tokens
    positions = torch.randn(1, 512, 64)

    def add_absolute_positions(
        _module: nn.Module, _args: object, output: torch.Tensor
    ) -> torch.Tensor:
        # A model that counts positions itself does not see where a packed sequence starts.
        return output + positions[:, : output.shape[1]]

    embedding.register_forward_hook(add_absolute_positions)
    with pytest.raises(UnsupportedModel, match="other logits in a packed batch"):
        adopt_attention(model)


def test_cudnn_does_not_plan_attention_for_every_shape() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        settle_attention(torch.device("cpu"))
        assert torch.backends.cuda.cudnn_sdp_enabled()
        settle_attention(torch.device("cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
