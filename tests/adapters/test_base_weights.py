import pytest
import torch
from transformers import LlamaForCausalLM

from dynamic_lora_adapters import BaseGeometry
from dynamic_lora_adapters.base_weights import ModelWeights, NoWeights, linear_weight
from tests.support.models import TINY_MODELS, tiny_llama

Q = "model.layers.0.self_attn.q_proj"


def test_parameters_are_given_in_float32(model: LlamaForCausalLM) -> None:
    half = tiny_llama()
    for parameter in half.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    value = ModelWeights(half).parameter(f"{Q}.weight")
    assert value.dtype == torch.float32
    assert value.equal(model.get_parameter(f"{Q}.weight").to(torch.bfloat16).float())


def test_a_shared_parameter_is_known_by_both_names() -> None:
    tied = tiny_llama(tie_word_embeddings=True)
    weights = ModelWeights(tied)
    assert weights.parameter("lm_head.weight").equal(weights.parameter("model.embed_tokens.weight"))


@pytest.mark.parametrize(
    "name", ["lm_head.bias", "model.nothing.weight", "model.layers", "lm_head"]
)
def test_what_is_no_parameter_is_a_key_error(name: str, model: LlamaForCausalLM) -> None:
    with pytest.raises(KeyError, match=name):
        ModelWeights(model).parameter(name)


def test_weights_of_conv1d_are_turned_round() -> None:
    model = TINY_MODELS["gpt2"]()
    path = "transformer.h.0.attn.c_attn"
    shape = BaseGeometry.of(model, model_id="tiny").linears[path]
    weight = linear_weight(ModelWeights(model), path, shape)
    assert tuple(weight.shape) == (shape.out_features, shape.in_features) == (192, 64)
    assert weight.equal(model.get_parameter(f"{path}.weight").T)


def test_no_weights_say_what_was_asked_for() -> None:
    with pytest.raises(ValueError, match="the base model's 'x.weight': pass base="):
        NoWeights().parameter("x.weight")
