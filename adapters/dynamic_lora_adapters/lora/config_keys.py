"""Which keys of PEFT's `LoraConfig` are honoured, harmless or refused."""

from collections.abc import Mapping
from typing import Any

from dynamic_lora_adapters.errors import InvalidAdapter, UnsupportedAdapter
from dynamic_lora_adapters.lora.config_values import is_unset, refusal

# Keys of PEFT's LoraConfig that `LoraSpec` reads.
_READ_KEYS = frozenset(
    {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "lora_bias",
        "bias",
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "modules_to_save",
        "trainable_token_indices",
        "alora_invocation_tokens",
        "ensure_weight_tying",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "velora_config",
    }
)

# Keys that describe training or the way PEFT holds the model; the product is the same.
# PEFT corrects `fan_in_fan_out` by the class of each layer, and reads the settings of
# an initialisation only if `init_lora_weights` names it.
_HARMLESS_KEYS = frozenset(
    {
        "auto_mapping",
        "peft_version",
        "inference_mode",
        "lora_dropout",
        "fan_in_fan_out",
        "eva_config",
        "loftq_config",
        "corda_config",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
    }
)

# Keys that change the result and are not served, with what they do.
_REFUSED_KEYS = {
    "layer_replication": "it changes the base model's layers",
    "megatron_config": "it is for Megatron's parallel layers",
    "use_qalora": "QALoRA pools the layer's input",
    "monteclora_config": "MonteCLoRA is not served",
    "use_bdlora": "block-diagonal LoRA is not served",
    "arrow_config": "Arrow routes between adapters token by token",
    "kasa_config": "KaSA is not served",
}


# With null PEFT initialises nothing. MiCA starts from the base's weight but leaves it alone.
_UNCHANGED_BASE_INITS = (None, "gaussian", "orthogonal", "eva", "mica")
# PEFT saves these as plain LoRA on request: twice the rank, init_lora_weights = true.
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")


def check_keys(config: Mapping[str, Any]) -> None:
    """Refuse the kinds, keys and initialisations that are not served, each by name.

    Raises `UnsupportedAdapter`, and `InvalidAdapter` for what is no PEFT config.
    """
    _check_kind(config)
    _check_refused(config)
    _check_init(config.get("init_lora_weights", True))


def _check_kind(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind is None:
        raise InvalidAdapter(
            "peft_type is missing: this is not PEFT's adapter_config.json.", field="peft_type"
        )
    if kind != "LORA":
        raise UnsupportedAdapter(
            f"peft_type {kind!r} is not served; LORA is.",
            field="peft_type",
            fix="Train the adapter with peft.LoraConfig.",
        )
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise UnsupportedAdapter(
            f"task_type {task!r} is not served; CAUSAL_LM is.", field="task_type"
        )


def _check_refused(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key in _READ_KEYS or key in _HARMLESS_KEYS or is_unset(value):
            continue
        raise refusal(key, value, _REFUSED_KEYS.get(key, "this server does not know the key"))


def _check_init(value: object) -> None:
    # With these the base stays as it was; every other init moves a part of W0 into the factors.
    # PEFT knows some of the names in any case of letters.
    name = value.lower() if isinstance(value, str) else value
    if isinstance(name, bool) or name in _UNCHANGED_BASE_INITS:
        return
    fix = "Train the adapter with another init_lora_weights."
    if str(name).startswith(_CONVERTIBLE_INITS):
        fix = (
            "Convert it to a plain LoRA: "
            "save_pretrained(path, path_initial_model_for_weight_conversion=...)."
        )
    raise UnsupportedAdapter(
        f"init_lora_weights = {value!r} is not served: "
        "the adapter was trained against a base model changed by its initialisation.",
        field="init_lora_weights",
        fix=fix,
    )
