"""What `adapter_config.json` says, read strictly.

A key that changes the result is honoured or the adapter is refused by that
key's name. PEFT adds keys with every release: one that is unknown here passes
while it is null, false or empty, and is refused with any other value.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from dynamic_lora_adapters.errors import AdapterError, InvalidAdapter, UnsupportedAdapter

ALL_LINEAR = "all-linear"
MAX_RANK = 4096
_MAX_PATTERN_LENGTH = 2000

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
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "bias",
    }
)

# Keys that describe training or the way PEFT holds the model; the product is the same.
_HARMLESS_KEYS = frozenset(
    {
        "auto_mapping",
        "peft_version",
        "inference_mode",
        "lora_dropout",
        "eva_config",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
    }
)

# Keys that change the result and are not served, with what they do.
_REFUSED_KEYS = {
    "use_dora": "DoRA also rescales the base weights",
    "lora_bias": "it adds a trained bias to B",
    "modules_to_save": "it replaces whole layers of the base model",
    "trainable_token_indices": "it replaces token embeddings",
    "target_parameters": "it adapts parameters that are no linear layers",
    "alora_invocation_tokens": "activated LoRA applies from an invocation sequence on",
    "fan_in_fan_out": "it is for Conv1D layers, which take no adapter here",
    "layer_replication": "it changes the base model's layers",
    "megatron_config": "it is for Megatron's parallel layers",
    "loftq_config": "LoftQ trains against a changed base model",
    "corda_config": "CorDA trains against a changed base model",
    "lora_ga_config": "LoRA-GA trains against a changed base model",
    "use_qalora": "QALoRA pools the layer's input",
    "velora_config": "VeLoRA is not served",
    "monteclora_config": "MonteCLoRA is not served",
    "use_bdlora": "block-diagonal LoRA is not served",
    "arrow_config": "Arrow routes between adapters token by token",
    "kasa_config": "KaSA is not served",
    "ensure_weight_tying": "it ties adapters across layers",
}

_UNCHANGED_BASE_INITS = ("gaussian", "orthogonal", "eva")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """The part of a PEFT LoRA config that decides the result.

    `target_modules` is a tuple of module names, a regular expression over whole
    module paths, or "all-linear". The keys of `rank_pattern` and
    `alpha_pattern` are regular expressions for the end of a module path; the
    first that matches wins. `base_model` and `revision` are what the adapter
    says of its base. Raises `InvalidAdapter` naming the key at fault.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str
    use_rslora: bool = False
    exclude_modules: tuple[str, ...] | str | None = None
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    base_model: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        _check_rank("r", self.rank)
        _check_alpha("lora_alpha", self.alpha)
        for key, rank in self.rank_pattern:
            _check_rank(f"rank_pattern.{key}", rank)
        for key, alpha in self.alpha_pattern:
            _check_alpha(f"alpha_pattern.{key}", alpha)
        if not self.target_modules:
            raise InvalidAdapter(
                "target_modules is missing or empty: the adapter names no layer.",
                field="target_modules",
            )
        self._check_layers()
        for key, pattern in self.patterns():
            _check_pattern(key, pattern)

    def _check_layers(self) -> None:
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise InvalidAdapter(
                "layers_to_transform needs target_modules to be a list.",
                field="layers_to_transform",
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise InvalidAdapter(
                "layers_pattern needs layers_to_transform.", field="layers_pattern"
            )

    @property
    def kind(self) -> str:
        """`lora` (scaling alpha/r) or `rslora` (alpha/sqrt(r))."""
        return "rslora" if self.use_rslora else "lora"

    def scaling(self, rank: int, alpha: float) -> float:
        """The factor on B·A for one module (rsLoRA: Kalajdzievski, 2023)."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def patterns(self) -> list[tuple[str, str]]:
        """Every regular expression in the config, as (key, pattern)."""
        found = [("rank_pattern", key) for key, _ in self.rank_pattern]
        found += [("alpha_pattern", key) for key, _ in self.alpha_pattern]
        found += [("layers_pattern", key) for key in self.layers_pattern]
        if isinstance(self.target_modules, str) and self.target_modules.lower() != ALL_LINEAR:
            found.append(("target_modules", self.target_modules))
        if isinstance(self.exclude_modules, str):
            found.append(("exclude_modules", self.exclude_modules))
        return found

    def canonical(self) -> dict[str, Any]:
        """The result-changing values in one spelling, for the content digest.

        What the adapter says of its base is left out: two uploads of the same
        factors are the same content. Patterns keep their order, which counts.
        """
        return {
            "kind": self.kind,
            "r": self.rank,
            "lora_alpha": float(self.alpha),
            "target_modules": _sorted_names(self.target_modules),
            "exclude_modules": _sorted_names(self.exclude_modules),
            "rank_pattern": [list(item) for item in self.rank_pattern],
            "alpha_pattern": [[key, float(value)] for key, value in self.alpha_pattern],
            "layers_to_transform": self.layers_to_transform and sorted(self.layers_to_transform),
            "layers_pattern": list(self.layers_pattern),
        }

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Self:
        """Read the content of `adapter_config.json`.

        Raises `UnsupportedAdapter` for a PEFT kind or key that is not served,
        `InvalidAdapter` for a value that no PEFT release would accept.
        """
        _check_kind(config)
        _check_refused(config)
        _check_init(config.get("init_lora_weights", True))
        if config.get("bias", "none") != "none":
            raise _refusal("bias", config["bias"], "it trains biases of the base model")
        for key in ("r", "lora_alpha"):
            if key not in config:
                raise InvalidAdapter(f"{key} is missing from adapter_config.json.", field=key)
        return cls(
            rank=config["r"],
            alpha=config["lora_alpha"],
            use_rslora=_bool(config, "use_rslora"),
            target_modules=_names(config, "target_modules") or (),
            exclude_modules=_names(config, "exclude_modules"),
            rank_pattern=tuple(_mapping(config, "rank_pattern").items()),
            alpha_pattern=tuple(_mapping(config, "alpha_pattern").items()),
            layers_to_transform=_layer_indices(config),
            layers_pattern=_as_tuple(_names(config, "layers_pattern")),
            base_model=_optional_text(config, "base_model_name_or_path"),
            revision=_optional_text(config, "revision"),
        )


def _refusal(key: str, value: object, reason: str) -> AdapterError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return UnsupportedAdapter(
        f"{key} = {shown} is not served: {reason}.",
        field=key,
        fix=f"Train the adapter without {key}.",
    )


def _invalid(key: str, value: object, expected: str) -> AdapterError:
    return InvalidAdapter(f"{key} must be {expected}, not {value!r}.", field=key)


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


def _is_unset(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})


def _check_refused(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key in _READ_KEYS or key in _HARMLESS_KEYS or _is_unset(value):
            continue
        raise _refusal(key, value, _REFUSED_KEYS.get(key, "this server does not know the key"))


def _check_init(value: object) -> None:
    # With these the base stays as it was; every other init moves a part of W0 into the factors.
    if isinstance(value, bool) or value in _UNCHANGED_BASE_INITS:
        return
    if value == "mica":
        raise _refusal("init_lora_weights", value, "MiCA is not served")
    raise UnsupportedAdapter(
        f"init_lora_weights = {value!r} is not served: "
        "the adapter was trained against a base model changed by its initialisation.",
        field="init_lora_weights",
        fix="Convert it to a plain LoRA: "
        "save_pretrained(path, path_initial_model_for_weight_conversion=...).",
    )


def _check_rank(key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
        raise _invalid(key, value, f"an integer from 1 to {MAX_RANK}")


def _check_alpha(key: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # The comparison also refuses integers too large for a float, and NaN.
    if not number or not 0 < value <= 1e9:  # type: ignore[operator]
        raise _invalid(key, value, "a number above 0 and at most 1e9")


def _check_pattern(key: str, pattern: str) -> None:
    if len(pattern) > _MAX_PATTERN_LENGTH:
        raise InvalidAdapter(
            f"A pattern in {key} is longer than {_MAX_PATTERN_LENGTH} characters.", field=key
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InvalidAdapter(
            f"{pattern!r} in {key} is not a regular expression: {error}.", field=key
        ) from None


def _bool(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise _invalid(key, value, "true or false")
    return bool(value)


def _optional_text(config: Mapping[str, Any], key: str) -> str | None:
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise _invalid(key, value, "a string or null")
    return value or None


def _names(config: Mapping[str, Any], key: str) -> tuple[str, ...] | str | None:
    value = config.get(key)
    if isinstance(value, list) and all(isinstance(name, str) and name for name in value):
        return tuple(value) or None
    if value is not None and not isinstance(value, str):
        raise _invalid(key, value, "a string or a list of non-empty strings")
    return value or None


def _as_tuple(names: tuple[str, ...] | str | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names or ()


def _sorted_names(names: tuple[str, ...] | str | None) -> list[str] | str | None:
    return sorted(set(names)) if isinstance(names, tuple) else names


def _mapping(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise _invalid(key, value, "an object")
    return value or {}


def _layer_indices(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    value = config.get("layers_to_transform")
    indices = value if isinstance(value, list) else [] if value is None else [value]
    for index in indices:
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise _invalid("layers_to_transform", index, "an integer from 0, or a list of them")
    # PEFT reads an empty list as "all layers".
    return tuple(indices) or None
