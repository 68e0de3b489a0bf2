import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftType

from dynamic_lora_adapters import InvalidAdapter, LoraSpec, UnsupportedAdapter
from dynamic_lora_adapters.lora.spec import MAX_LISTED, MAX_RANK

BASIC: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
}

HONOURED_OR_HARMLESS = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {"q_proj": 4},
    "auto_mapping": {"base_model_class": "X", "parent_library": "y"},
    "base_model_name_or_path": "org/model",
    "bias": "lora_only",
    "corda_config": {"x": 1},
    "ensure_weight_tying": True,
    "eva_config": {"rho": 2.0},
    "exclude_modules": ["lm_head"],
    "fan_in_fan_out": True,
    "inference_mode": True,
    "init_lora_weights": "gaussian",
    "layers_pattern": ["layers"],
    "layers_to_transform": [0],
    "loftq_config": {"loftq_bits": 4},
    "lora_alpha": 32,
    "lora_bias": True,
    "lora_dropout": 0.1,
    "lora_ga_config": {"x": 1},
    "megatron_core": "megatron.core",
    "modules_to_save": ["norm"],
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {"q_proj": 2},
    "revision": "main",
    "runtime_config": {"ephemeral_gpu_offload": False},
    "target_modules": ["k_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": {"embed_tokens": [3], "lm_head": [4, 1]},
    "use_dora": None,
    "use_rslora": True,
    "velora_config": None,
}

REFUSED = {
    "arrow_config": {"top_k": 2},
    "kasa_config": {"x": 1},
    "layer_replication": [[0, 1]],
    "megatron_config": {"x": 1},
    "monteclora_config": {"x": 1},
    "use_bdlora": {"x": 1},
    "use_qalora": True,
}


def parse(**changes: Any) -> LoraSpec:
    return LoraSpec.parse(BASIC | changes)


def test_every_key_of_peft_is_classified() -> None:
    keys = {field.name for field in dataclasses.fields(LoraConfig)}
    assert keys - set(HONOURED_OR_HARMLESS) - set(REFUSED) == set()


def test_honoured_and_harmless_keys_pass() -> None:
    spec = LoraSpec.parse(HONOURED_OR_HARMLESS)
    assert spec.rank == 4
    assert spec.alpha == 32
    assert spec.kind == "rslora"
    assert spec.target_modules == ("k_proj",)
    assert spec.exclude_modules == ("lm_head",)
    assert spec.rank_pattern == (("q_proj", 2),)
    assert spec.alpha_pattern == (("q_proj", 4),)
    assert spec.layers_to_transform == (0,)
    assert spec.layers_pattern == ("layers",)
    assert spec.bias == "lora_only"
    assert spec.lora_bias
    assert spec.ensure_weight_tying
    assert spec.modules_to_save == ("norm",)
    assert spec.trainable_token_indices == (("embed_tokens", (3,)), ("lm_head", (4, 1)))
    assert spec.base_model == "org/model"
    assert spec.revision == "main"


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_is_not_served_is_refused_by_name(key: str) -> None:
    with pytest.raises(UnsupportedAdapter, match=f"{key} = .* is not served: ") as caught:
        parse(**{key: REFUSED[key]})
    assert caught.value.field == key
    assert caught.value.fix == f"Train the adapter without {key}."
    assert "does not know" not in caught.value.message


def test_a_default_peft_config_passes() -> None:
    config: dict[str, Any] = LoraConfig(task_type="CAUSAL_LM").to_dict()  # type: ignore[no-untyped-call]
    spec = LoraSpec.parse({**config, "target_modules": ["q_proj"]})
    assert (spec.rank, spec.alpha, spec.kind) == (8, 8, "lora")


@given(st.sampled_from([None, False, "", [], {}]))
def test_an_unknown_key_without_a_value_passes(value: object) -> None:
    assert parse(some_future_key=value) == parse()


@given(st.sampled_from([True, 0, 1, "x", [0], {"a": None}]))
def test_an_unknown_key_with_a_value_is_refused(value: object) -> None:
    with pytest.raises(UnsupportedAdapter, match="does not know the key") as caught:
        parse(some_future_key=value)
    assert caught.value.field == "some_future_key"


@pytest.mark.parametrize("kind", [kind.value for kind in PeftType if kind.value != "LORA"])
def test_other_peft_types_are_refused(kind: str) -> None:
    with pytest.raises(UnsupportedAdapter, match=f"peft_type '{kind}' is not served"):
        parse(peft_type=kind)


@pytest.mark.parametrize(
    "init", [True, False, None, "gaussian", "Gaussian", "orthogonal", "eva", "mica", "MiCA"]
)
def test_inits_that_leave_the_base_alone_pass(init: bool | str | None) -> None:
    assert parse(init_lora_weights=init) == parse()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "OLoRA", "loftq", "corda", "lora_ga"])
def test_inits_that_change_the_base_are_refused(init: str) -> None:
    with pytest.raises(UnsupportedAdapter, match="a base model changed by its init") as caught:
        parse(init_lora_weights=init)
    assert caught.value.field == "init_lora_weights"
    converts = "path_initial_model_for_weight_conversion" in (caught.value.fix or "")
    assert converts == (init != "loftq")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", 0, "r must be an integer from 1 to 4096, not 0"),
        ("r", -1, "r must be an integer"),
        ("r", 8.0, "r must be an integer"),
        ("r", True, "r must be an integer"),
        ("r", "8", "r must be an integer"),
        ("r", None, "r must be an integer"),
        ("r", MAX_RANK + 1, "r must be an integer"),
        ("lora_alpha", None, "lora_alpha must be a number from -1e9 to 1e9"),
        ("lora_alpha", "16", "lora_alpha must be a number from -1e9 to 1e9"),
        ("lora_alpha", 10**400, "lora_alpha must be a number from -1e9"),
        ("lora_alpha", -(10**400), "lora_alpha must be a number from -1e9"),
        ("lora_alpha", math.nan, "lora_alpha must be a number from -1e9"),
        ("rank_pattern", {"q_proj": 0}, "rank_pattern.q_proj must be an integer"),
        ("rank_pattern", ["q_proj"], "rank_pattern must be an object"),
        ("alpha_pattern", {"q_proj": True}, "alpha_pattern.q_proj must be a number from"),
        ("alpha_pattern", {"(": 1}, r"'\(' in alpha_pattern is not a regular expression"),
        ("use_rslora", "true", "use_rslora must be true or false"),
        ("target_modules", None, "target_modules is missing or empty"),
        ("target_modules", [], "target_modules is missing or empty"),
        ("target_modules", [1], "target_modules must be a string or a list"),
        ("target_modules", ["q_proj", ""], "target_modules must be a string or a list"),
        ("target_modules", {"q": 1}, "target_modules must be a string or a list"),
        ("target_modules", "(unclosed", "is not a regular expression"),
        ("target_modules", "a" * 2001, "longer than 2000 characters"),
        ("exclude_modules", "*", "in exclude_modules is not a regular expression"),
        ("layers_to_transform", [-1], "layers_to_transform must be an integer from 0"),
        ("layers_to_transform", "0", "layers_to_transform must be an integer from 0"),
        ("layers_pattern", "layers", "layers_pattern needs layers_to_transform"),
        ("base_model_name_or_path", 3, "base_model_name_or_path must be a string or null"),
        ("peft_type", None, "peft_type is missing"),
        ("bias", "some", "bias must be one of none, all, lora_only, not 'some'"),
        ("bias", None, "bias must be one of none, all, lora_only, not None"),
        ("use_dora", 1, "use_dora must be true or false, not 1"),
        ("target_parameters", "a.weight", "target_parameters must be a list of non-empty"),
        ("modules_to_save", [""], "modules_to_save must be a string or a list of non-empty"),
        ("modules_to_save", ["("], r"'\(' in modules_to_save is not a regular expression"),
        ("alora_invocation_tokens", [-1], "alora_invocation_tokens must be an integer from 0"),
        ("trainable_token_indices", ["a"], "trainable_token_indices must be an integer from 0"),
        ("trainable_token_indices", {"lm_head": [2, 2]}, "trainable_token_indices lists a token t"),
    ],
)
def test_impossible_values_are_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(InvalidAdapter, match=message):
        parse(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", [f"w{i}" for i in range(MAX_LISTED + 1)]),
        ("modules_to_save", [f"w{i}" for i in range(MAX_LISTED + 1)]),
        ("alpha_pattern", {f"w{i}": 2 for i in range(MAX_LISTED + 1)}),
        ("layers_to_transform", list(range(MAX_LISTED + 1))),
    ],
)
def test_lists_without_end_are_refused(key: str, value: object) -> None:
    """Each entry is compared with every module."""
    with pytest.raises(InvalidAdapter, match=f"{key} has 32,769 entries; at most") as caught:
        parse(**{key: value})
    assert caught.value.field == key


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_missing_numbers_are_refused(key: str) -> None:
    config = {k: v for k, v in BASIC.items() if k != key}
    with pytest.raises(InvalidAdapter, match=f"{key} is missing"):
        LoraSpec.parse(config)


@pytest.mark.parametrize("key", ["layers_to_transform", "layers_pattern"])
def test_layers_with_a_pattern_target_are_refused(key: str) -> None:
    config: dict[str, Any] = {"layers_to_transform": [], "layers_pattern": []}
    config[key] = ["h"] if key == "layers_pattern" else [0]
    with pytest.raises(InvalidAdapter, match=f"{key} needs target_modules to be a list"):
        parse(target_modules=".*q_proj", **config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True, "lora_bias": True}, "use_dora and lora_bias cannot go together"),
        (
            {"use_dora": True, "alora_invocation_tokens": [1]},
            "use_dora and alora_invocation_tokens cannot go together",
        ),
        (
            {"lora_bias": True, "target_parameters": ["w"]},
            "lora_bias and target_parameters cannot go together",
        ),
    ],
)
def test_what_peft_cannot_combine_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidAdapter, match=message):
        parse(**config)


@pytest.mark.parametrize(
    "early", [{"bias": "all"}, {"modules_to_save": ["x"]}, {"trainable_token_indices": [1]}]
)
def test_alora_with_parts_that_know_no_invocation_is_refused(early: dict[str, Any]) -> None:
    (key,) = early
    message = f"alora_invocation_tokens with {key} is not served"
    with pytest.raises(UnsupportedAdapter, match=message) as caught:
        parse(alora_invocation_tokens=[1], **early)
    assert caught.value.field == key


def test_kinds() -> None:
    assert parse(use_dora=True, use_rslora=True).kind == "dora"
    assert parse(alora_invocation_tokens=[1]).kind == "alora"


def test_parameters_alone_are_targets_enough() -> None:
    spec = parse(target_modules=None, target_parameters=["experts.down_proj"])
    assert spec.target_modules == ()
    assert spec.target_parameters == ("experts.down_proj",)


@pytest.mark.parametrize("task", ["SEQ_CLS", "SEQ_2_SEQ_LM"])
def test_other_tasks_are_refused(task: str) -> None:
    with pytest.raises(UnsupportedAdapter, match=f"task_type '{task}' is not served"):
        parse(task_type=task)


@given(st.integers(1, MAX_RANK), st.floats(0.01, 1000))
def test_scaling(rank: int, alpha: float) -> None:
    assert parse().scaling(rank, alpha) == alpha / rank
    assert parse(use_rslora=True).scaling(rank, alpha) == alpha / math.sqrt(rank)


def test_canonical_form_ignores_order_and_origin_but_no_result() -> None:
    same = parse(target_modules=["v_proj", "q_proj"], base_model_name_or_path="x", lora_alpha=16.0)
    assert same.canonical() == parse().canonical()
    different: list[dict[str, Any]] = [
        {"r": 4},
        {"lora_alpha": 8},
        {"use_rslora": True},
        {"target_modules": ["q_proj"]},
        {"exclude_modules": ["x"]},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"layers_to_transform": [0]},
        {"layers_to_transform": [0], "layers_pattern": ["h"]},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"target_parameters": ["w"]},
        {"modules_to_save": ["norm"]},
        {"trainable_token_indices": [1]},
        {"trainable_token_indices": {"lm_head": [1]}},
        {"alora_invocation_tokens": [1, 2]},
        {"alora_invocation_tokens": [2, 1]},
        {"ensure_weight_tying": True},
    ]
    forms = [str(parse(**change).canonical()) for change in different]
    assert len({*forms, str(parse().canonical())}) == len(different) + 1


def test_an_empty_list_of_layers_means_all() -> None:
    assert parse(layers_to_transform=[]).canonical() == parse().canonical()
    with_pattern = parse(layers_to_transform=[], layers_pattern=["layers"])
    assert with_pattern.layers_to_transform == ()


def test_velora_is_how_an_adapter_was_trained() -> None:
    spec = parse(velora_config={})
    assert spec.use_velora
    assert spec.canonical() == parse().canonical()
