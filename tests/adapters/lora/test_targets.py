import copy
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaForCausalLM

import dynamic_lora_adapters.lora.patterns as patterns_module
from dynamic_lora_adapters import (
    BaseGeometry,
    IncompatibleAdapter,
    InvalidAdapter,
    LoraSpec,
    UnsupportedAdapter,
)
from dynamic_lora_adapters.geometry import LinearShape
from dynamic_lora_adapters.lora.targets import (
    find_parameters,
    find_targets,
    saved_modules,
    unmatched_names,
)
from tests.support.adapters import ALL_TARGETS
from tests.support.models import TINY_MODELS, TINY_MOE_MODELS, tiny_llama

BASIC: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}

CONFIGS: dict[str, dict[str, Any]] = {
    "leaf names": {"target_modules": ["q_proj", "down_proj"]},
    "paths": {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]},
    "regex": {"target_modules": r"model\.layers\.\d\.(self_attn\.[qk]|mlp\.up)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear in capitals": {"target_modules": "All-Linear"},
    "all but": {"target_modules": "all-linear", "exclude_modules": ["v_proj", "layers.0.mlp"]},
    "all but a regex": {"target_modules": list(ALL_TARGETS), "exclude_modules": r".*\.0\..*"},
    "embedding and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "saved modules": {"target_modules": list(ALL_TARGETS), "modules_to_save": ["mlp"]},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layers by name": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
        "layers_pattern": "layers",
    },
    "no layers, by name": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [],
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


def test_modules_that_take_no_delta_are_refused(geometry: BaseGeometry) -> None:
    message = r"'model.layers.0.mlp' \(LlamaMLP\), which cannot"
    with pytest.raises(UnsupportedAdapter, match=message):
        find_targets(spec_of(target_modules=["q_proj", "mlp"]), geometry)


def test_an_embedding_of_positions_is_refused() -> None:
    geometry = BaseGeometry.of(TINY_MODELS["gpt2"](), model_id="tiny-gpt2")
    with pytest.raises(UnsupportedAdapter, match=r"'transformer.wpe' \(Embedding\), which cannot"):
        find_targets(spec_of(target_modules=["wpe"]), geometry)


def test_saved_modules_are_no_targets(geometry: BaseGeometry) -> None:
    spec = spec_of(target_modules="all-linear", modules_to_save=["mlp", "head"])
    leaves = {target.path.rsplit(".", 1)[-1] for target in find_targets(spec, geometry)}
    assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert saved_modules(spec, geometry) == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
        "lm_head",
    ]


def test_parameters_of_one_module_are_nested_as_peft_nests_them() -> None:
    geometry = BaseGeometry.of(TINY_MOE_MODELS["qwen3_moe"](), model_id="tiny-moe")
    spec = spec_of(target_modules=[], target_parameters=["down_proj", "experts.gate_up_proj"])
    first, second, *_ = find_parameters(spec, geometry)
    assert (first.name, first.wrapper) == (
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.base_layer",
    )
    assert (second.name, second.wrapper) == (
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.mlp.experts",
    )
    assert find_targets(spec, geometry) == []


def test_names_that_match_nothing_beside_others_are_told(geometry: BaseGeometry) -> None:
    """Not those of modules that something else in the config leaves out."""
    spec = spec_of(
        target_modules=["q_proj", "layers.1.mlp.up_proj", "w1", "lm_head", "k_proj"],
        target_parameters=["experts.w2"],
        modules_to_save=["norm", "score", "lm_head"],
        exclude_modules=["k_proj"],
    )
    assert unmatched_names(spec, geometry) == [
        ("target_modules", "w1"),
        ("target_parameters", "experts.w2"),
        ("modules_to_save", "score"),
    ]
    regex = spec_of(target_modules=".*q_proj")
    assert unmatched_names(regex, geometry) == []


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"target_modules": r"(.+)+!"}, "target_modules"),
        ({"target_modules": r"(?i)(.+)+!"}, "target_modules"),
        ({"target_modules": ["q_proj"], "exclude_modules": r"(.*)*!"}, "exclude_modules"),
        ({"target_modules": ["q_proj"], "rank_pattern": {r"(.+)+!": 2}}, "rank_pattern"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["(.+)+!"]}, "modules_to_save"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {r"(.+)+!": 2}}, "alpha_pattern"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "(.+)+"},
            "layers_pattern",
        ),
        (
            {
                "target_modules": ["q_proj"],
                "target_parameters": ["v_proj.weight"],
                # Quick for every module, whose path never ends like this.
                "rank_pattern": {r"(?=.*\.weight$)(\w+\.?)+Z": 4},
            },
            "rank_pattern",
        ),
    ],
)
def test_a_runaway_pattern_is_refused_in_bounded_time(
    config: dict[str, Any], key: str, geometry: BaseGeometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns_module, "_PROBE_SECONDS", 1.0)
    with pytest.raises(InvalidAdapter, match=f"in {key} takes over 1 seconds"):
        find_targets(spec_of(**config), geometry)


@pytest.mark.parametrize(
    ("pattern", "num_proofs"),
    [(r"^model\.layers\.0\.self_attn\.q_proj$", 0), ("layers.0.*q_proj", 1)],
)
def test_patterns_are_proved_once_and_paths_never(
    pattern: str, num_proofs: int, geometry: BaseGeometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    proofs: list[object] = []
    monkeypatch.setattr(patterns_module, "_proved", set())
    monkeypatch.setattr(subprocess, "run", lambda *args, **_: proofs.append(args))
    spec = spec_of(target_modules=["q_proj"], rank_pattern={pattern: 2})
    for _ in range(3):
        assert [target.rank for target in find_targets(spec, geometry)] == [2, 4]
    assert len(proofs) == num_proofs


def test_a_pattern_that_peft_cannot_embed_is_refused(geometry: BaseGeometry) -> None:
    config = {"target_modules": ["q_proj"], "rank_pattern": {"(?i)Q_PROJ": 2}}
    with pytest.raises(InvalidAdapter, match="PEFT cannot use a regular expression") as caught:
        find_targets(spec_of(**config), geometry)
    assert caught.value.field == "rank_pattern"


def test_a_pattern_that_peft_cannot_embed_is_refused_for_parameters_too() -> None:
    geometry = BaseGeometry.of(TINY_MOE_MODELS["qwen3_moe"](), model_id="tiny-moe")
    config = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    spec = spec_of(**config, rank_pattern={"(?i)DOWN_PROJ": 2})
    with pytest.raises(InvalidAdapter, match="PEFT cannot use a regular expression"):
        find_targets(spec, geometry)


def test_a_pattern_for_each_of_many_modules(geometry: BaseGeometry) -> None:
    """As EVA writes them: more than Python remembers compiled."""
    linears = {f"layers.{i}.q_proj": LinearShape(4, 4) for i in range(600)}
    many = replace(geometry, linears=linears, modules=dict.fromkeys(linears, "Linear"))
    ranks = {path: 1 + i % 7 for i, path in enumerate(reversed(linears))}
    spec = spec_of(target_modules=["q_proj"], rank_pattern=ranks)
    begin = time.process_time()
    found = find_targets(spec, many)
    assert time.process_time() - begin < 3
    assert {target.path: target.rank for target in found} == ranks


def test_flags_at_the_start_of_a_target_are_honoured(geometry: BaseGeometry) -> None:
    targets = find_targets(spec_of(target_modules="(?i).*Q_PROJ"), geometry)
    assert {target.path.rsplit(".", 1)[-1] for target in targets} == {"q_proj"}
