import copy
from collections.abc import Mapping
from typing import Any

import pytest
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaForCausalLM

import dynamic_lora_adapters.targets as targets_module
from dynamic_lora_adapters import (
    BaseGeometry,
    IncompatibleAdapter,
    InvalidAdapter,
    LoraSpec,
    UnsupportedAdapter,
)
from dynamic_lora_adapters.targets import find_targets, unmatched_names
from tests.support.adapters import ALL_TARGETS
from tests.support.models import TINY_MODELS, tiny_llama

BASIC: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}

CONFIGS: dict[str, dict[str, Any]] = {
    "leaf names": {"target_modules": ["q_proj", "down_proj"]},
    "paths": {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]},
    "regex": {"target_modules": r"model\.layers\.\d\.(self_attn\.[qk]|mlp\.up)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear in capitals": {"target_modules": "All-Linear"},
    "all but": {"target_modules": "all-linear", "exclude_modules": ["v_proj", "layers.0.mlp"]},
    "all but a regex": {"target_modules": list(ALL_TARGETS), "exclude_modules": r".*\.0\..*"},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layers by name": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
        "layers_pattern": "layers",
    },
    "patterns": {
        "target_modules": list(ALL_TARGETS),
        "use_rslora": True,
        "rank_pattern": {"q_proj": 8, r"layers\.0\..*": 2, "mlp.up_proj": 3, "[kov]_proj": 5},
        "alpha_pattern": {r"model\.layers\.1.*": 3, "v_proj": 5},
    },
}


def spec_of(**config: Any) -> LoraSpec:
    return LoraSpec.parse(BASIC | config)


def peft_targets(model_config: Mapping[str, Any]) -> dict[str, tuple[int, float]]:
    """What PEFT itself does with the config, on a model of its own."""

    config = LoraConfig(**copy.deepcopy({**BASIC, **model_config}))
    model = inject_adapter_in_model(config, tiny_llama())
    return {
        path: (module.r["default"], module.scaling["default"])
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_targets_ranks_and_scalings_are_pefts(
    config: dict[str, Any], geometry: BaseGeometry
) -> None:
    found = find_targets(spec_of(**config), geometry)
    assert {t.path: (t.rank, t.scaling) for t in found} == peft_targets(config)


def test_targets_come_in_the_models_order(model: LlamaForCausalLM, geometry: BaseGeometry) -> None:
    paths = [t.path for t in find_targets(spec_of(target_modules="all-linear"), geometry)]
    assert paths == [path for path, _ in model.named_modules() if path in geometry.linears]


def test_targets_that_match_nothing_are_refused(geometry: BaseGeometry) -> None:
    spec = spec_of(target_modules=["query_key_value"])
    with pytest.raises(IncompatibleAdapter, match=r"\['query_key_value'\] matches no module") as e:
        find_targets(spec, geometry)
    assert "gate_proj, k_proj" in (e.value.fix or "")


@pytest.mark.parametrize(
    ("target", "path", "kind"),
    [
        ("lm_head", "lm_head", "Linear"),
        ("embed_tokens", "model.embed_tokens", "Embedding"),
        ("mlp", "model.layers.0.mlp", "LlamaMLP"),
    ],
)
def test_modules_that_take_no_delta_are_refused(
    target: str, path: str, kind: str, geometry: BaseGeometry
) -> None:
    with pytest.raises(UnsupportedAdapter, match=rf"'{path}' \({kind}\), which cannot"):
        find_targets(spec_of(target_modules=["q_proj", target]), geometry)


def test_conv1d_is_refused_even_as_all_linear() -> None:
    geometry = BaseGeometry.of(TINY_MODELS["gpt2"](), model_id="tiny-gpt2")
    with pytest.raises(UnsupportedAdapter, match=r"\(Conv1D\)"):
        find_targets(spec_of(target_modules="all-linear"), geometry)


def test_names_that_match_nothing_beside_others_are_told(geometry: BaseGeometry) -> None:
    spec = spec_of(target_modules=["q_proj", "layers.1.mlp.up_proj", "w1"])
    assert unmatched_names(spec, find_targets(spec, geometry)) == ["w1"]
    regex = spec_of(target_modules=".*q_proj")
    assert unmatched_names(regex, find_targets(regex, geometry)) == []


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"target_modules": r"(.+)+!"}, "target_modules"),
        ({"target_modules": r"(?i)(.+)+!"}, "target_modules"),
        ({"target_modules": ["q_proj"], "exclude_modules": r"(.*)*!"}, "exclude_modules"),
        ({"target_modules": ["q_proj"], "rank_pattern": {r"(.+)+!": 2}}, "rank_pattern"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {r"(.+)+!": 2}}, "alpha_pattern"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "(.+)+"},
            "layers_pattern",
        ),
    ],
)
def test_a_runaway_pattern_is_refused_in_bounded_time(
    config: dict[str, Any], key: str, geometry: BaseGeometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets_module, "_PROBE_SECONDS", 1.0)
    with pytest.raises(InvalidAdapter, match=f"in {key} takes over 1 seconds"):
        find_targets(spec_of(**config), geometry)


def test_a_pattern_that_peft_cannot_embed_is_refused(geometry: BaseGeometry) -> None:
    config = {"target_modules": ["q_proj"], "rank_pattern": {"(?i)Q_PROJ": 2}}
    with pytest.raises(InvalidAdapter, match="PEFT cannot use a regular expression") as caught:
        find_targets(spec_of(**config), geometry)
    assert caught.value.field == "rank_pattern"


def test_flags_at_the_start_of_a_target_are_honoured(geometry: BaseGeometry) -> None:
    targets = find_targets(spec_of(target_modules="(?i).*Q_PROJ"), geometry)
    assert {target.path.rsplit(".", 1)[-1] for target in targets} == {"q_proj"}
