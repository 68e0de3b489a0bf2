"""Which positions a model has, and the tables by which they are rotated."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dynamic_lora_server.engine import rotary
from dynamic_lora_server.engine.rotary import RotaryTables, context_window
from tests.support.engines import make_engine, make_sequence, random_prompt, run_all
from tests.support.models import TINY_MODELS, tiny_llama

LIKE = torch.zeros(1)


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


def test_a_sequence_that_leaves_the_tables_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_prompt(30, seed=1)
    expected = run_all(make_engine(tiny_llama(), native=False), [make_sequence(prompt)])
    monkeypatch.setattr(rotary, "_MOST_POSITIONS", 35)
    assert run_all(make_engine(tiny_llama()), [make_sequence(prompt)]) == expected
