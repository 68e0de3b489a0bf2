import pytest

from dynamic_lora_adapters import BaseGeometry, LinearShape
from dynamic_lora_adapters.geometry import EmbeddingShape
from tests.support.models import TINY_MODELS, TINY_MOE_MODELS, tiny_llama


def test_a_llama() -> None:
    geometry = BaseGeometry.of(tiny_llama(), model_id="org/Tiny")
    assert (geometry.model_id, geometry.model_type, geometry.num_layers) == ("org/Tiny", "llama", 2)
    assert len(geometry.linears) == 2 * 7
    assert geometry.linears["model.layers.1.mlp.up_proj"] == LinearShape(64, 96)
    assert geometry.heads == {"lm_head": LinearShape(64, 300)}
    assert geometry.embeddings == {"model.embed_tokens": EmbeddingShape(300, 64)}
    assert geometry.modules["model.norm"] == "LlamaRMSNorm"
    assert geometry.parameters["model.norm.weight"] == (64,)
    assert not geometry.tied


def test_linear_finds_layers_and_the_head() -> None:
    geometry = BaseGeometry.of(tiny_llama(), model_id="x")
    assert geometry.linear("lm_head") == LinearShape(64, 300)
    assert geometry.linear("model.layers.0.self_attn.k_proj") == LinearShape(64, 32)
    assert geometry.linear("model.norm") is None


def test_conv1d_is_a_transposed_linear_layer() -> None:
    geometry = BaseGeometry.of(TINY_MODELS["gpt2"](), model_id="x")
    shape = geometry.linears["transformer.h.0.mlp.c_fc"]
    assert shape == LinearShape(64, 256, transposed=True)
    assert geometry.heads == {"lm_head": LinearShape(64, 300)}
    assert geometry.tied


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_told_by_its_weight(tied: bool) -> None:
    geometry = BaseGeometry.of(tiny_llama(tie_word_embeddings=tied), model_id="x")
    assert geometry.tied == tied
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= geometry.parameters.keys()


def test_experts_are_parameters() -> None:
    geometry = BaseGeometry.of(TINY_MOE_MODELS["qwen3_moe"](), model_id="x")
    assert len(geometry.parameters["model.layers.0.mlp.experts.down_proj"]) == 3
    assert geometry.transposed_experts == frozenset()


def test_the_fingerprint_is_of_the_architecture() -> None:
    first = BaseGeometry.of(tiny_llama(), model_id="a")
    same = BaseGeometry.of(tiny_llama(seed=1, tie_word_embeddings=True), model_id="b")
    wide = BaseGeometry.of(tiny_llama(intermediate_size=128), model_id="a")
    assert first.fingerprint == same.fingerprint != wide.fingerprint
