"""Every feature of PEFT's LoRA, saved by PEFT and read into terms, against PEFT's own logits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import VeloraConfig

from dynamic_lora_adapters import (
    InvalidAdapter,
    LoraSpec,
    UnsupportedAdapter,
    read_adapter,
)
from dynamic_lora_adapters.files.json_file import read_json_object
from dynamic_lora_adapters.home.passport import find_features
from tests.support.adapters import edit_config, load_with_peft, quiet, save_adapter
from tests.support.apply_terms import logits
from tests.support.geometry import geometry_of
from tests.support.lora_terms import PROMPT, check_against_peft, lora, read, refused
from tests.support.models import TINY_MODELS, TINY_MOE_MODELS
from tests.support.uploads import edit_tensors

MODELS = {**TINY_MODELS, **TINY_MOE_MODELS}
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
BIASED = {"attention_bias": True}

QV = ["q_proj", "v_proj"]
# name: (family, config of the model, config of the adapter, features)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[str]]] = {
    "lora on Conv1D": ("gpt2", {}, {"target_modules": ["c_attn", "c_fc"]}, []),
    "all-linear on Conv1D": (
        "gpt2",
        {},
        {"target_modules": "all-linear", "fan_in_fan_out": True},
        [],
    ),
    "alphas below and at zero": (
        "llama",
        {},
        {"target_modules": QV, "lora_alpha": -8, "alpha_pattern": {"v_proj": 0}},
        [],
    ),
    "MiCA": (
        "llama",
        TIED,
        {"target_modules": [*QV, "embed_tokens"], "init_lora_weights": "mica"},
        ["embedding"],
    ),
    "VeLoRA": (
        "llama",
        {},
        {"target_modules": QV, "velora_config": VeloraConfig(num_groups=8), "lora_bias": True},
        ["bias"],
    ),
    "lora_bias": ("llama", BIASED, {"target_modules": QV, "lora_bias": True}, ["bias"]),
    "lora_bias on Conv1D": (
        "gpt2",
        {},
        {"target_modules": "all-linear", "lora_bias": True},
        ["bias"],
    ),
    "lora_bias without a base bias": (
        "llama",
        {},
        {"target_modules": QV, "lora_bias": True, "use_rslora": True},
        ["bias"],
    ),
    "bias all": ("gpt2", {}, {"target_modules": ["c_attn"], "bias": "all"}, ["bias", "override"]),
    "bias all, no norms": ("qwen2", {}, {"target_modules": QV, "bias": "all"}, ["bias"]),
    "bias lora_only": ("opt", {}, {"target_modules": QV, "bias": "lora_only"}, ["bias"]),
    "bias lora_only and lora_bias": (
        "qwen2",
        {},
        {"target_modules": QV, "bias": "lora_only", "lora_bias": True},
        ["bias"],
    ),
    "dora": ("llama", {}, {"target_modules": "all-linear", "use_dora": True}, ["scale"]),
    "rsdora, mixed ranks": (
        "qwen2",
        {},
        {
            "target_modules": "all-linear",
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 8},
        },
        ["scale"],
    ),
    "dora on Conv1D": ("gpt2", {}, {"target_modules": "all-linear", "use_dora": True}, ["scale"]),
    "dora with bias": (
        "opt",
        {},
        {"target_modules": QV, "use_dora": True, "bias": "lora_only"},
        ["bias", "scale"],
    ),
    "embedding": ("llama", UNTIED, {"target_modules": ["q_proj", "embed_tokens"]}, ["embedding"]),
    "embedding, tied": (
        "llama",
        TIED,
        {"target_modules": ["q_proj", "embed_tokens"]},
        ["embedding"],
    ),
    "embedding, Gemma": (
        "gemma3_text",
        {},
        {"target_modules": ["embed_tokens"]},
        ["embedding"],
    ),
    "embedding, dora": (
        "llama",
        TIED,
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
        ["scale", "embedding"],
    ),
    "embedding, dora, Gemma": (
        "gemma2",
        {},
        {"target_modules": ["embed_tokens"], "use_dora": True},
        ["embedding"],
    ),
    "head": ("llama", UNTIED, {"target_modules": ["q_proj", "lm_head"]}, []),
    "head, tied": ("llama", TIED, {"target_modules": ["lm_head"], "use_dora": True}, ["scale"]),
    "head and embedding, tied by the adapter": (
        "llama",
        TIED,
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True},
        ["embedding"],
    ),
    "head and embedding, tied by the adapter, dora": (
        "llama",
        TIED,
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_dora": True},
        ["scale", "embedding"],
    ),
    "embedding by a pattern that ties nothing": (
        "llama",
        TIED,
        {"target_modules": r"model\.embed_tokens|.*q_proj", "ensure_weight_tying": True},
        ["embedding"],
    ),
    "head and embedding by a pattern, tied by the adapter": (
        "llama",
        TIED,
        {"target_modules": r".*(q_proj|embed_tokens)", "ensure_weight_tying": True},
        ["embedding"],
    ),
    "all-linear, mixture of experts": (
        "qwen3_moe",
        {},
        {"target_modules": "all-linear"},
        ["override"],
    ),
    "saved head": (
        "llama",
        UNTIED,
        {"target_modules": QV, "modules_to_save": ["lm_head"]},
        ["dense"],
    ),
    "saved head, tied": (
        "gpt2",
        {},
        {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
        ["dense"],
    ),
    "saved embedding, tied": (
        "llama",
        TIED,
        {"target_modules": QV, "modules_to_save": ["embed_tokens"]},
        ["embedding"],
    ),
    "saved embedding and head, tied by the adapter": (
        "llama",
        TIED,
        {"target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        ["dense", "embedding"],
    ),
    "saved norms and biases": (
        "gpt2",
        {},
        {"target_modules": ["c_attn"], "modules_to_save": ["ln_1", "ln_f"]},
        ["override"],
    ),
    "saved norm by a part of its name": (
        "qwen3",
        {},
        {"target_modules": QV, "modules_to_save": ["norm"]},
        ["override"],
    ),
    "saved projection beside targets": (
        "qwen2",
        {},
        {"target_modules": "all-linear", "modules_to_save": ["v_proj"], "use_dora": True},
        ["bias", "scale", "dense"],
    ),
    "saved Conv1D": (
        "gpt2",
        {},
        {"target_modules": ["c_attn"], "modules_to_save": ["c_fc"]},
        ["bias", "dense"],
    ),
    "saved MLP": (
        "llama",
        {},
        {"target_modules": QV, "modules_to_save": ["layers.1.mlp"]},
        ["dense"],
    ),
    "saved router": (
        "qwen3_moe",
        {},
        {"target_modules": QV, "modules_to_save": ["mlp.gate"]},
        ["override"],
    ),
    "tokens": (
        "llama",
        UNTIED,
        {"target_modules": QV, "trainable_token_indices": [42, 3]},
        ["embedding"],
    ),
    "tokens, tied": (
        "llama",
        TIED,
        {"target_modules": QV, "trainable_token_indices": [42, 3]},
        ["embedding"],
    ),
    "tokens, tied, Conv1D": (
        "gpt2",
        {},
        {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [42, 3, 17]}},
        ["embedding"],
    ),
    "tokens, Gemma": (
        "gemma2",
        {},
        {"target_modules": QV, "trainable_token_indices": [42]},
        ["embedding"],
    ),
    "tokens of the head": (
        "llama",
        UNTIED,
        {"target_modules": QV, "trainable_token_indices": {"lm_head": [7, 8]}},
        [],
    ),
    "tokens of both, tied": (
        "llama",
        TIED,
        {
            "target_modules": QV,
            "trainable_token_indices": {"embed_tokens": [7, 8], "lm_head": [7, 8]},
        },
        ["embedding"],
    ),
    "other tokens of each, tied": (
        "llama",
        TIED,
        {
            "target_modules": QV,
            "trainable_token_indices": {"embed_tokens": [7, 8], "lm_head": [3]},
        },
        ["embedding"],
    ),
    "experts": (
        "qwen3_moe",
        {},
        {"target_modules": [], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]},
        ["override"],
    ),
    "experts, Mixtral": (
        "mixtral",
        {},
        {
            "target_modules": QV,
            "target_parameters": ["mlp.experts.gate_up_proj"],
            "rank_pattern": {"experts.gate_up_proj": 2},
            "use_rslora": True,
        },
        ["override"],
    ),
    "router as a parameter": (
        "qwen3_moe",
        {},
        {"target_modules": QV, "target_parameters": ["gate.weight"]},
        ["override"],
    ),
    "a projection as a parameter": (
        "llama",
        {},
        {"target_modules": [], "target_parameters": ["o_proj.weight"]},
        ["dense"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_terms_do_what_peft_does(case: str, tmp_path: Path) -> None:
    family, overrides, config, features = CASES[case]
    model = MODELS[family](**overrides)
    folder = save_adapter(tmp_path, model, lora(**config))
    terms = check_against_peft(folder, model)
    assert find_features(terms) == features


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_a_converted_init_is_a_plain_lora(init: str, use_rslora: bool, tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    config = lora(target_modules=QV, init_lora_weights=init, use_rslora=use_rslora)
    with quiet(), torch.random.fork_rng(devices=[]):
        peft_model = get_peft_model(copy.deepcopy(model), config)
        initial: Any = peft_model.peft_config["default"]
        initial.init_lora_weights = True
        peft_model.save_pretrained(str(tmp_path / "initial"), save_embedding_layers=False)
        initial.init_lora_weights = init
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.data += torch.randn(parameter.shape) * 0.1
        with torch.no_grad():
            expected = peft_model.eval()(input_ids=PROMPT[None]).logits[0]
        peft_model.save_pretrained(
            str(tmp_path / "converted"),
            path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
            save_embedding_layers=False,
        )
    terms = read(tmp_path / "converted", model)
    assert {term.rank for term in terms.linears.values()} == {8}
    torch.testing.assert_close(logits(model, terms, PROMPT), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("init", [None, "Gaussian", "mica"])
def test_inits_that_leave_the_base_alone_do_not_count(init: str | None, tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    folder = save_adapter(tmp_path, model, lora(target_modules=QV))
    edit_config(folder, init_lora_weights=init)
    check_against_peft(folder, model)


def test_settings_of_an_init_that_was_converted_do_not_count(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    folder = save_adapter(tmp_path, model, lora(target_modules=QV))
    edit_config(folder, corda_config={"cov": 1}, lora_ga_config={"scale": "stable"})
    check_against_peft(folder, model)


def test_alora_carries_its_invocation(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    config = lora(target_modules=QV, alora_invocation_tokens=[3, 42])
    folder = save_adapter(tmp_path, model, config)
    terms = read(folder, model)
    assert terms.invocation_ids == (3, 42)
    assert find_features(terms) == ["invocation"]
    # The prompt begins with the invocation, so the whole of it is adapted.
    prompt = torch.tensor([3, 42, 7, 19, 101])
    peft_model = load_with_peft(model, {"default": folder})
    with torch.no_grad():
        expected = peft_model(input_ids=prompt[None]).logits[0]
    torch.testing.assert_close(logits(model, terms, prompt), expected, rtol=0, atol=1e-4)


def test_alora_of_a_token_that_the_base_does_not_have_is_refused(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    folder = save_adapter(tmp_path, model, lora(target_modules=QV))
    edit_config(folder, alora_invocation_tokens=[3, 10**12])
    with pytest.raises(InvalidAdapter, match=r"lists 1000000000000, but the base has \d+"):
        read(folder, model)


def test_alora_on_the_embedding_is_refused(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    folder = save_adapter(tmp_path, model, lora(target_modules=["embed_tokens"]))
    edit_config(folder, alora_invocation_tokens=[3])
    with pytest.raises(InvalidAdapter, match=r"alora_invocation_tokens cannot go together with"):
        read(folder, model)


def test_magnitudes_of_rows_without_length_are_refused(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    folder = save_adapter(tmp_path, model, lora(target_modules=["q_proj"], use_dora=True))
    edit_tensors(folder, lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k])
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.q_proj.weight")[0] = 0
    with pytest.raises(InvalidAdapter, match=r"rows of '.*q_proj' whose norm is zero"):
        read(folder, model)


def test_a_tied_pair_that_is_saved_is_no_target(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"](**TIED)
    config = lora(target_modules=QV, modules_to_save=["lm_head"], ensure_weight_tying=True)
    folder = save_adapter(tmp_path, model, config)
    # As written by hand: PEFT itself saves what it has made of the list.
    edit_config(folder, target_modules=[*QV, "embed_tokens"], modules_to_save=["lm_head"])
    assert find_features(check_against_peft(folder, model)) == ["dense", "embedding"]


def test_factors_of_a_tied_pair_must_agree(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"](**TIED)
    config = lora(target_modules=["embed_tokens"], ensure_weight_tying=True)
    folder = save_adapter(tmp_path, model, config)
    edit_tensors(folder, lambda t: t["base_model.model.lm_head.lora_A.weight"].mul_(2))
    refused(folder, model, InvalidAdapter, "the factors of 'model.embed_tokens' and 'lm_head'")


def test_modules_that_take_no_new_value_are_refused(tmp_path: Path) -> None:
    model = TINY_MODELS["gpt2"]()
    config = lora(target_modules=["c_attn"], modules_to_save=["wpe"])
    folder = save_adapter(tmp_path, model, config)
    message = r"a new value for 'transformer.wpe.weight' \(Embedding\), which is not served"
    refused(folder, model, UnsupportedAdapter, message)


def test_a_saved_module_that_is_missing_is_refused(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    folder = save_adapter(tmp_path, model, lora(target_modules=QV, modules_to_save=["lm_head"]))
    edit_tensors(folder, lambda t: t.pop("base_model.model.lm_head.weight"))
    refused(folder, model, InvalidAdapter, r"'base_model.model.lm_head.weight' is missing")


def test_parameters_that_nothing_asks_for_are_refused(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    folder = save_adapter(tmp_path, model, lora(target_modules=QV, modules_to_save=["norm"]))
    edit_config(folder, modules_to_save=["model.norm"])
    refused(folder, model, InvalidAdapter, "which neither modules_to_save nor bias asks for")


def test_a_lora_bias_in_a_config_without_is_refused(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    folder = save_adapter(tmp_path, model, lora(target_modules=QV, lora_bias=True))
    edit_config(folder, lora_bias=False)
    refused(folder, model, InvalidAdapter, "is a LoRA bias, which the config's lora_bias does not")


def test_an_adapter_that_needs_the_base_says_so(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    folder = save_adapter(tmp_path, model, lora(target_modules=QV, use_dora=True))
    spec = LoraSpec.parse(read_json_object(folder / "adapter_config.json"))
    with pytest.raises(ValueError, match=r"against the base model's '.*q_proj.weight': pass base"):
        read_adapter(folder, spec, geometry_of(model))
