import json
from pathlib import Path

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import LlamaForCausalLM

from dynamic_lora_adapters import BaseGeometry, InvalidAdapter, Passport, UnsupportedAdapter
from dynamic_lora_adapters.base_weights import ModelWeights
from dynamic_lora_adapters.home.inspection import Inspector, declared_base, folder_digest
from dynamic_lora_adapters.lora.spec import MAX_LISTED
from tests.adapters.kinds.checkpoints import edit_tensors, make
from tests.support.adapters import edit_config, quiet, save_adapter
from tests.support.geometry import geometry_of
from tests.support.models import tiny_llama


@pytest.fixture
def inspector(model: LlamaForCausalLM, geometry: BaseGeometry) -> Inspector:
    return Inspector(geometry, base=ModelWeights(model), dtype=torch.bfloat16)


def passport_of(folder: Path, inspector: Inspector) -> Passport:
    return inspector.inspect("ner", folder, force=False, ignored_files=()).passport


def test_the_passport_of_a_dora_tells_all_of_it(
    model: LlamaForCausalLM, inspector: Inspector, tmp_path: Path
) -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
        use_dora=True,
        modules_to_save=["lm_head", "score"],
    )
    passport = passport_of(save_adapter(tmp_path, model, config), inspector)
    assert (passport.kind, passport.rank, passport.num_modules) == ("dora", 4, 3)
    assert passport.features == ["scale", "dense"]
    assert passport.target_modules == ["q_proj"]
    assert 0 < passport.self_check < 0.05
    assert "bfloat16" in passport.checks[-1]
    assert "modules_to_save lists 'score', which the base does not have." in passport.notes


def test_a_copy_of_the_embeddings_is_noted(
    model: LlamaForCausalLM, inspector: Inspector, tmp_path: Path
) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    folder = save_adapter(tmp_path, model, config, save_embedding_layers=True)
    notes = passport_of(folder, inspector).notes
    assert "The file holds a copy of the base's 'lm_head.weight', which is left out." in notes


def test_a_differing_copy_is_noted(inspector: Inspector, tmp_path: Path) -> None:
    other = tiny_llama()
    other.lm_head.weight.data.mul_(2)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    folder = save_adapter(tmp_path, other, config, save_embedding_layers=True)
    passport = passport_of(folder, inspector)
    note = "The file's own 'lm_head.weight' differs from the base's and takes its place."
    assert note in passport.notes
    assert passport.features == ["dense"]


def test_other_kinds_are_read_too(inspector: Inspector, tmp_path: Path) -> None:
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[])
    with quiet():
        peft_model = get_peft_model(tiny_llama(), config)
        peft_model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    edit_config(tmp_path, base_model_name_or_path="org/Tiny-Llama", revision="main")
    passport = passport_of(tmp_path, inspector)
    assert (passport.kind, passport.rank, passport.base_model) == ("ia3", 0, "org/Tiny-Llama")
    assert passport.notes == ["The adapter was trained on revision 'main' of its base."]
    assert declared_base(tmp_path) == "org/Tiny-Llama"
    assert passport.version == folder_digest(tmp_path)
    assert inspector.read(tmp_path).linears.keys() == {
        f"model.layers.{i}.self_attn.v_proj" for i in range(2)
    }


@pytest.mark.parametrize("peft_version", [None, "0.17.1", "0.18.0"])
def test_what_peft_warns_of_is_noted(
    peft_version: str | None, model: LlamaForCausalLM, inspector: Inspector, tmp_path: Path
) -> None:
    config = OFTConfig(
        task_type="CAUSAL_LM", target_modules=["v_proj"], oft_block_size=8, use_cayley_neumann=True
    )
    make(tmp_path, model, config)
    edit_config(tmp_path, base_model_name_or_path=None, peft_version=peft_version)
    notes = passport_of(tmp_path, inspector).notes
    warned = [note for note in notes if "parameterization has been slightly changed" in note]
    assert len(warned) == (peft_version != "0.18.0")
    assert all(note.startswith("PEFT warns: The cayley-neumann") for note in warned)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("oft_block_size", None, "OFT has been updated since PEFT 0.14.0"),
        ("peft_version", 18, "peft_version"),
        ("peft_version", "soon", "PEFT cannot build"),
    ],
)
def test_a_config_that_peft_does_not_load_is_refused(
    key: str,
    value: object,
    text: str,
    model: LlamaForCausalLM,
    inspector: Inspector,
    tmp_path: Path,
) -> None:
    config = make(
        tmp_path,
        model,
        OFTConfig(target_modules=["v_proj"], oft_block_size=32, use_cayley_neumann=True),
    )
    config |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": None, key: value}
    if value is None:
        del config[key]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidAdapter, match=text):
        passport_of(tmp_path, inspector)


def test_a_config_may_list_every_module_of_a_large_base(adapter: Path) -> None:
    names = [f"model.layers.{i}.block_sparse_moe.experts.127.gate_proj" for i in range(MAX_LISTED)]
    edit_config(adapter, target_modules=names)
    assert folder_digest(adapter)


LARGE: dict[str, tuple[PeftConfig, str]] = {
    "prompt": (
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        "the virtual tokens",
    ),
    "prefix": (
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        "the virtual tokens' keys in layer 0",
    ),
    "norms": (
        LNTuningConfig(target_modules=["input_layernorm"]),
        "'model.layers.0.input_layernorm.weight'",
    ),
    "saved": (
        LoraConfig(target_modules=["q_proj"], modules_to_save=["model.norm"]),
        "'model.norm.weight'",
    ),
}


@pytest.mark.parametrize("case", LARGE)
def test_values_that_no_product_survives_are_refused(
    case: str, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    """At the upload, and at a load by a server that serves in a smaller format."""
    config, place = LARGE[case]
    make(tmp_path, model, config)
    base = ModelWeights(model)
    geometry = geometry_of(model, model_id="org/Tiny-Llama")
    full, half = (Inspector(geometry, base=base, dtype=d) for d in (None, torch.float16))
    edit_tensors(tmp_path, lambda tensors: _fill(tensors, 20_000.0))
    passport_of(tmp_path, full)
    with pytest.raises(InvalidAdapter, match=f"values for {place} reach 2e.* in float16"):
        half.read(tmp_path)
    with pytest.raises(InvalidAdapter, match=f"values for {place}.* compute with in float16"):
        passport_of(tmp_path, half)
    edit_tensors(tmp_path, lambda tensors: _fill(tensors, 3e38))
    with pytest.raises(InvalidAdapter, match=f"values for {place} reach 3e.*float32") as caught:
        passport_of(tmp_path, full)
    assert caught.value.field == place.strip("'")


def _fill(tensors: dict[str, torch.Tensor], value: float) -> None:
    """One large value at the start of every tensor but the factors."""
    for name, tensor in tensors.items():
        if "lora_" not in name:
            tensor.view(-1)[0] = value


def test_a_kind_that_is_not_served_is_refused_by_name(adapter: Path, inspector: Inspector) -> None:
    edit_config(adapter, peft_type="XLORA")
    with pytest.raises(UnsupportedAdapter, match="peft_type 'XLORA' is not served"):
        passport_of(adapter, inspector)
