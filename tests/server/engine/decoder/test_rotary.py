"""Which positions a model has, and the tables by which they are rotated."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dynamic_lora_adapters.apply.products import ProductKind, obstacle
from dynamic_lora_server.engine.decoder import rotary
from dynamic_lora_server.engine.decoder.llama_layers import Unsuited
from dynamic_lora_server.engine.decoder.rotary import RotaryTables, Rotation, context_window
from tests.support.engines import make_engine, make_sequence, random_prompt, run_all
from tests.support.models import TINY_MODELS, tiny_llama

LIKE = torch.zeros(1)
REASON = obstacle(ProductKind.NATIVE, torch.ones(8, 8))


def test_the_window_of_length_dependent_rope_is_the_original_one() -> None:
    config = tiny_llama().config
    assert context_window(config) == 512
    config.rope_parameters = {
        "rope_type": "dynamic",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 128,
    }
    assert context_window(config) == 128


def embedding_of(family: str) -> nn.Module:
    return TINY_MODELS[family]().get_submodule("model.rotary_emb")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@given(positions=st.lists(st.integers(0, 100), min_size=1, max_size=9))
def test_tables_hold_what_the_model_computes(family: str, positions: list[int]) -> None:
    """For positions in the tables, and where one is beyond them."""
    module, ids = embedding_of(family), torch.tensor([positions])
    cos, sin = module(LIKE, ids)
    found = RotaryTables(module, 64, LIKE).rotation(LIKE, ids)
    assert torch.equal(found.cos[found.places], cos[0])
    assert torch.equal(found.sin[found.places], sin[0])


class Stretching(nn.Module):
    """Angles that depend on the longest sequence that is asked for."""

    def forward(self, _: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = ids[..., None] * torch.ones(16) / (1 + ids.max())
        return angles.cos(), angles.sin()


def test_angles_that_depend_on_the_sequence_are_not_kept() -> None:
    module, ids = Stretching(), torch.tensor([[3, 1, 4]])
    found = RotaryTables(module, 64, LIKE).rotation(LIKE, ids)
    assert torch.equal(found.cos[found.places], module(LIKE, ids)[0][0])


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_length_dependent_rope_within_its_original_window(rope_type: str) -> None:
    """Whatever was asked for before."""
    config = tiny_llama().config
    config.rope_parameters = {
        "rope_type": rope_type,
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "short_factor": [1.5] * 8,
        "long_factor": [3.0] * 8,
    }
    module = LlamaRotaryEmbedding(config)
    module(LIKE, torch.arange(400)[None])
    tables = RotaryTables(module, context_window(config), LIKE)
    ids = torch.tensor([[0, 5, 127]])
    found = tables.rotation(LIKE, ids)
    fresh = LlamaRotaryEmbedding(config)(LIKE, ids)
    assert torch.equal(found.cos[found.places], fresh[0][0])
    assert torch.equal(found.sin[found.places], fresh[1][0])


class Flat(nn.Module):
    """Tables without a dimension for sequences."""

    def forward(self, _: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        table = torch.ones(ids.shape[1], 16)
        return table, table


def test_other_tables_than_a_row_for_each_position_are_refused() -> None:
    with pytest.raises(Unsuited, match=r"its rotary embedding gives \(64, 16\) and \(64, 16\)"):
        RotaryTables(Flat(), 64, LIKE)


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_a_sequence_that_leaves_the_tables_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_prompt(30, seed=1)
    expected = run_all(make_engine(tiny_llama(), native=False), [make_sequence(prompt)])
    monkeypatch.setattr(rotary, "_MOST_POSITIONS", 35)
    built = make_engine(tiny_llama(), base_product=ProductKind.NATIVE)
    assert built.engine.runner.decoder.num_layers
    sizes: list[int] = []
    rotation = RotaryTables.rotation

    def recording(self: RotaryTables, hidden: torch.Tensor, ids: torch.Tensor) -> Rotation:
        found = rotation(self, hidden, ids)
        sizes.append(len(found.cos))
        return found

    monkeypatch.setattr(RotaryTables, "rotation", recording)
    assert run_all(built, [make_sequence(prompt)]) == expected
    assert sizes == [35] * 6 + [1] * 4
