"""Options of an engine that the model decides about."""

from typing import Any

import pytest
import torch

from dynamic_lora_server.engine.build import EngineOptions, build_engine
from dynamic_lora_server.errors import InvalidParameter, UnsupportedModel
from tests.support.engines import make_engine
from tests.support.models import tiny_llama


def build(said: list[str], **options: Any) -> None:
    build_engine(
        tiny_llama(),
        model_id="tiny",
        options=EngineOptions(kv_memory=2**22, adapter_memory=2**22, **options),
        on_step=said.append,
    )


def test_weights_that_cannot_be_packed_are_refused_when_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dynamic_lora_server.engine.build.can_pack", lambda _: False)
    with pytest.raises(InvalidParameter, match=r"weights in torch\.float32 on cpu cannot be"):
        make_engine(tiny_llama(), pack_weights=True)


def test_weights_stay_plain_where_memory_for_the_copies_is_not_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr("dynamic_lora_server.engine.build._free_memory", lambda _: 1000)
    build(said)
    assert "Packing the weights" not in said
    build(said, pack_weights=True)
    assert "Packing the weights" in said


def test_a_quantised_base_is_refused_by_name() -> None:
    model = tiny_llama()
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    weight = torch.zeros(1, dtype=torch.int8)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM is quantised.*cannot be merged"):
        make_engine(model)
