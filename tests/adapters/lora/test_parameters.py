"""The base's own parameters in a checkpoint, saved by PEFT, against PEFT's own logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dynamic_lora_adapters import IncompatibleAdapter, InvalidAdapter
from dynamic_lora_adapters.home.passport import find_features
from tests.support.adapters import edit_config, save_adapter
from tests.support.lora_terms import check_against_peft, lora, notes_of, read, refused
from tests.support.models import TINY_MODELS, tiny_phi
from tests.support.uploads import WEIGHTS_FILE, edit_tensors

PREFIX = "base_model.model."
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
QV = ["q_proj", "v_proj"]


def names(folder: Path) -> set[str]:
    return {name.removeprefix(PREFIX) for name in load_file(folder / WEIGHTS_FILE)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"], ["lm_head"]])
def test_copies_of_the_bases_embeddings_are_left_out(
    targets: list[str], tied: bool, tmp_path: Path
) -> None:
    model = TINY_MODELS["llama"](tie_word_embeddings=tied)
    config = lora(target_modules=targets)
    folder = save_adapter(tmp_path, model, config, save_embedding_layers=True)
    terms = check_against_peft(folder, model)
    assert "dense" not in find_features(terms)
    assert all(embedding.rows is None for embedding in terms.embeddings.values())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("use_dora", [True, False])
def test_copies_that_differ_take_the_bases_place(
    tied: bool, use_dora: bool, tmp_path: Path
) -> None:
    model = TINY_MODELS["llama"](tie_word_embeddings=tied)
    config = lora(target_modules=["q_proj", "embed_tokens"], use_dora=use_dora)
    folder = save_adapter(tmp_path, model, config, save_embedding_layers=True)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    edit_tensors(folder, lambda t: t[key][40:60].mul_(-1))
    terms = check_against_peft(folder, model)
    assert ("dense" in find_features(terms)) == tied


# name: (config of the model, config of the adapter, names that the file must have)
BELOW_WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "saved pair": (
        UNTIED,
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"lm_head.weight", "lm_head.original_module.weight", "lm_head.modules_to_save.weight"},
    ),
    "saved head, tied": (
        TIED,
        {"modules_to_save": ["lm_head"]},
        {"lm_head.original_module.weight", "model.embed_tokens.weight"},
    ),
    "saved embedding, tied": (
        TIED,
        {"modules_to_save": ["embed_tokens"]},
        {"model.embed_tokens.original_module.weight", "lm_head.weight"},
    ),
    "saved pair, tied by the adapter": (
        TIED,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"lm_head.original_module.weight", "lm_head.modules_to_save.weight"},
    ),
    "tokens": (
        UNTIED,
        {"trainable_token_indices": [42, 3]},
        {"model.embed_tokens.token_adapter.base_layer.weight", "lm_head.weight"},
    ),
    "tokens, tied": (
        TIED,
        {"trainable_token_indices": [42, 3]},
        {"lm_head.token_adapter.base_layer.weight", "lm_head.token_adapter.trainable_tokens_delta"},
    ),
    "tokens of both, tied": (
        TIED,
        {"trainable_token_indices": {"embed_tokens": [7, 8], "lm_head": [7, 8]}},
        {"lm_head.token_adapter.base_layer.weight"},
    ),
    "other tokens of each, tied": (
        TIED,
        {"trainable_token_indices": {"embed_tokens": [7, 8], "lm_head": [3]}},
        {"lm_head.token_adapter.base_layer.weight"},
    ),
}


@pytest.mark.parametrize("case", BELOW_WRAPPERS)
def test_all_that_is_saved_below_a_wrapper_is_understood(case: str, tmp_path: Path) -> None:
    overrides, config, expected = BELOW_WRAPPERS[case]
    model = TINY_MODELS["llama"](**overrides)
    config = {"target_modules": QV, **config}
    folder = save_adapter(tmp_path, model, lora(**config), save_embedding_layers=True)
    assert expected <= names(folder)
    check_against_peft(folder, model)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_trained_on_a_copy_that_differs(tied: bool, tmp_path: Path) -> None:
    model = TINY_MODELS["llama"](tie_word_embeddings=tied)
    config = lora(target_modules=QV, trainable_token_indices=[42, 3])
    folder = save_adapter(tmp_path, model, config, save_embedding_layers=True)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("token_adapter.base_layer.weight"):
                tensor[40:60] *= -1

    edit_tensors(folder, change)
    terms = check_against_peft(folder, model)
    assert ("dense" in find_features(terms)) == tied
    note = "The file's own 'model.embed_tokens.weight' differs from the base's and takes its place."
    assert note in notes_of(folder, model)


@pytest.mark.parametrize(
    ("family", "targets", "norm"),
    [
        ("gpt2", ["c_attn"], "ln_f"),
        ("opt", QV, "final_layer_norm"),
        ("gpt_neox", ["query_key_value"], "final_layer_norm"),
    ],
)
def test_biases_of_replaced_norms_are_saved_with_all_biases(
    family: str, targets: list[str], norm: str, tmp_path: Path
) -> None:
    model = TINY_MODELS[family]()
    config = lora(target_modules=targets, modules_to_save=[norm], bias="all")
    folder = save_adapter(tmp_path, model, config)
    found = {name.split(f"{norm}.")[-1] for name in names(folder) if norm in name}
    assert found == {"weight", "bias", "original_module.bias", "modules_to_save.bias"}
    check_against_peft(folder, model)


def test_biases_within_a_replaced_module_are_saved_with_all_biases(tmp_path: Path) -> None:
    """Here PEFT leaves the adapter's name in theirs."""
    model = TINY_MODELS["gpt2"]()
    config = lora(target_modules=["c_attn"], modules_to_save=["mlp"], bias="all")
    folder = save_adapter(tmp_path, model, config)
    assert "transformer.h.0.mlp.modules_to_save.default.c_fc.bias" in names(folder)
    check_against_peft(folder, model)


def test_a_new_value_that_is_there_twice_must_agree(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    config = lora(target_modules=QV, modules_to_save=["lm_head"])
    folder = save_adapter(tmp_path, model, config, save_embedding_layers=True)
    edit_tensors(folder, lambda t: t[f"{PREFIX}lm_head.modules_to_save.weight"].mul_(2))
    refused(folder, model, InvalidAdapter, "are the same new value but differ")


def test_rows_of_a_tied_pair_must_agree(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"](**TIED)
    config = lora(target_modules=QV, trainable_token_indices=[42, 3])
    folder = save_adapter(tmp_path, model, config, save_embedding_layers=True)
    key = f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta"
    edit_tensors(folder, lambda t: t[key].mul_(2))
    refused(folder, model, InvalidAdapter, "The trained rows of 'model.embed_tokens' and 'lm_head'")


def test_copies_below_a_wrapper_that_nothing_asks_for_are_refused(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    config = lora(target_modules=QV, modules_to_save=["lm_head"])
    folder = save_adapter(tmp_path, model, config, save_embedding_layers=True)
    edit_config(folder, modules_to_save=None)
    refused(folder, model, InvalidAdapter, "'lm_head.weight', whose module neither modules_to_save")


def test_copies_of_a_tied_pair_must_agree(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"](**TIED)
    config = lora(target_modules=["q_proj"])
    folder = save_adapter(tmp_path, model, config, save_embedding_layers=True)
    edit_tensors(folder, lambda t: t["base_model.model.lm_head.weight"].mul_(2))
    refused(folder, model, InvalidAdapter, "The copies of .* differ; the base model has one")


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [42, 305]},
    ],
)
def test_a_resized_vocabulary_is_another_base(keys: dict[str, Any], tmp_path: Path) -> None:
    model = TINY_MODELS["llama"](vocab_size=310)
    config = lora(target_modules=["q_proj"], **keys)
    folder = save_adapter(tmp_path, model, config, save_embedding_layers=True)
    message = r"\[310, 64\]; \[300, 64\] is needed: the vocabulary was resized from 300 to 310"
    refused(folder, TINY_MODELS["llama"](), IncompatibleAdapter, message)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "base_layer.bias"),
        ({"target_modules": ["q_proj"]}, "bias"),
        ({"target_modules": QV, "modules_to_save": ["lm_head"]}, "original_module.bias"),
    ],
)
@pytest.mark.parametrize("differs", [False, True])
def test_the_bias_of_a_head_is_copied_too(
    config: dict[str, Any], name: str, differs: bool, tmp_path: Path
) -> None:
    model = tiny_phi()
    folder = save_adapter(tmp_path, model, lora(**config), save_embedding_layers=True)
    if differs:
        edit_tensors(folder, lambda t: t[f"{PREFIX}lm_head.{name}"].neg_())
    check_against_peft(folder, model)
    note = "The file's own 'lm_head.bias' differs from the base's and takes its place."
    assert (note in notes_of(folder, model)) == (differs and "modules_to_save" not in config)


def test_biases_that_earlier_releases_did_not_save_are_the_bases(tmp_path: Path) -> None:
    model = TINY_MODELS["opt"]()
    folder = save_adapter(tmp_path, model, lora(target_modules=QV, bias="lora_only"))
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if not k.endswith("bias")})
    check_against_peft(folder, model)
    (note,) = notes_of(folder, model)
    assert note.startswith("bias is 'lora_only', but the file has no trained biases")


def test_one_trained_bias_of_many_that_is_missing_is_refused(tmp_path: Path) -> None:
    model = TINY_MODELS["opt"]()
    folder = save_adapter(tmp_path, model, lora(target_modules=QV, bias="lora_only"))
    key = f"{PREFIX}model.decoder.layers.1.self_attn.q_proj.base_layer.bias"
    edit_tensors(folder, lambda t: t.pop(key))
    refused(folder, model, InvalidAdapter, r"layers.1.self_attn.q_proj.bias' is missing")


def test_copies_are_rounded_as_the_base_is(tmp_path: Path) -> None:
    """The file was saved in float32, from a base that is served in bfloat16."""
    model = TINY_MODELS["llama"]()
    config = lora(target_modules=["q_proj"])
    folder = save_adapter(tmp_path, model, config, save_embedding_layers=True)
    rounded = TINY_MODELS["llama"]()
    rounded.to(torch.bfloat16)  # type: ignore[arg-type]
    terms = read(folder, rounded)
    assert not terms.embeddings
    assert all(path.endswith("q_proj") for path in terms.linears)
