from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaForCausalLM

from dynamic_lora_adapters import (
    AdapterTerms,
    BaseGeometry,
    IncompatibleAdapter,
    InvalidAdapter,
    LoraSpec,
    UnsupportedAdapter,
    read_adapter,
)
from dynamic_lora_adapters.base_weights import ModelWeights
from dynamic_lora_adapters.files.json_file import read_json_object
from tests.support.adapters import edit_config, save_adapter
from tests.support.apply_terms import linear_delta
from tests.support.models import tiny_llama, tiny_phi

EMBEDDING = "model.embed_tokens"


def read(folder: Path, model: torch.nn.Module) -> AdapterTerms:
    spec = LoraSpec.parse(read_json_object(folder / "adapter_config.json"))
    return read_adapter(folder, spec, BaseGeometry.of(model, model_id="x"), ModelWeights(model))


def saved(folder: Path, model: LlamaForCausalLM, indices: Any, targets: list[str]) -> Path:
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets, trainable_token_indices=indices
    )
    return save_adapter(folder, model, config)


@pytest.fixture
def folder(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    return saved(tmp_path, model, [7, 3], ["q_proj"])


def test_only_the_named_rows_change(folder: Path, model: LlamaForCausalLM) -> None:
    terms = read(folder, model)
    embedding = terms.embeddings[EMBEDDING]
    assert embedding.token_ids is not None
    assert embedding.rows is not None
    assert embedding.token_ids.tolist() == [7, 3]
    assert embedding.rows.shape == (2, 64)
    assert "lm_head" not in terms.linears


def test_a_tied_head_gets_the_same_rows(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    terms = read(saved(tmp_path, model, [7, 3], ["q_proj"]), model)
    head, rows = terms.linears["lm_head"], terms.embeddings[EMBEDDING].rows
    assert head.a is not None
    assert head.b is not None
    assert rows is not None
    delta = head.b @ head.a
    assert delta[[7, 3]].equal(rows)
    assert delta.count_nonzero(dim=1).nonzero().flatten().tolist() == [3, 7]


@pytest.mark.parametrize(("num_rows", "dense"), [(52, False), (53, True)])
def test_a_tied_head_takes_no_more_than_a_dense_one(
    num_rows: int, dense: bool, tmp_path: Path
) -> None:
    """Of 300 tokens and 64 values each."""
    model = tiny_llama(tie_word_embeddings=True)
    indices = list(range(290, 290 - num_rows, -1))
    terms = read(saved(tmp_path, model, indices, ["q_proj"]), model)
    head, rows = terms.linears["lm_head"], terms.embeddings[EMBEDDING].rows
    assert (head.dense is not None, head.a is None) == (dense, dense)
    delta = linear_delta(head, torch.zeros(300, 64))
    assert rows is not None
    assert delta[indices].equal(rows)
    assert int(delta.any(dim=1).sum()) == num_rows


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([7, 300], IncompatibleAdapter, "names token 300; 'model.embed_tokens' .* has 300"),
        ([7], IncompatibleAdapter, r"has shape \[2, 64\]; \[1, 64\] is needed"),
        ({"wte": [7, 3]}, InvalidAdapter, "names 'wte', which the base does not have"),
        ({"q_proj": [7, 3]}, UnsupportedAdapter, r"'model.layers.0.self_attn.q_proj' \(Linear\)"),
        (None, InvalidAdapter, "trained token embeddings, which the config's trainable_token_ind"),
    ],
)
def test_indices_that_do_not_fit_are_refused(
    indices: Any, error: type[Exception], message: str, folder: Path, model: LlamaForCausalLM
) -> None:
    edit_config(folder, trainable_token_indices=indices)
    with pytest.raises(error, match=message):
        read(folder, model)


def test_rows_of_a_head_that_is_adapted_too_are_refused(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    folder = saved(tmp_path, model, None, ["lm_head"])
    other = saved(tmp_path / "other", model, [7], ["q_proj"])
    edit_config(folder, trainable_token_indices=[7])
    for path in (other, folder):
        edit_config(path, target_modules=["lm_head"])
    join(folder, other)
    with pytest.raises(InvalidAdapter, match="changes 'lm_head', which the adapter changes other"):
        read(folder, model)


def join(folder: Path, other: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = "adapter_model.safetensors"
    tokens = {k: v for k, v in load_file(other / file).items() if "token_adapter" in k}
    save_file({**load_file(folder / file), **tokens}, folder / file)


def test_a_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    """PEFT leaves the bias out of such a head's product, which nobody can have meant."""
    model = tiny_phi()
    adapter = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices={"lm_head": [7]}
    )
    with pytest.raises(UnsupportedAdapter, match="'lm_head', which has a bias that PEFT would"):
        read(save_adapter(tmp_path, model, adapter), model)
