"""What `adapter_config.json` says, read strictly.

A key that changes the result is honoured or the adapter is refused by that
key's name. PEFT adds keys with every release: one that is unknown here passes
while it is null, false or empty, and is refused with any other value.
Imports no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from dynamic_lora_adapters.errors import InvalidAdapter, UnsupportedAdapter
from dynamic_lora_adapters.lora.config_keys import check_keys
from dynamic_lora_adapters.lora.config_values import (
    check_pattern,
    invalid,
    read_bool,
    read_indices,
    read_list,
    read_mapping,
    read_names,
    read_text,
    read_token_indices,
)

ALL_LINEAR = "all-linear"
MAX_RANK = 4096
# Entries of one list, each of which is compared with every module: PEFT itself writes one for
# each module, of which the largest mixtures of experts have some 20,000.
MAX_LISTED = 32_768

_LISTS = (
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "modules_to_save",
    "trainable_token_indices",
)
_BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """The part of a PEFT LoRA config that decides the result.

    `target_modules` is a tuple of module names, a regular expression over whole
    module paths, or "all-linear". The keys of `rank_pattern` and
    `alpha_pattern` are regular expressions for the end of a module path; the
    first that matches wins. An empty `layers_to_transform` means all layers, as
    None does. `trainable_token_indices` are token ids by the name
    of their layer ("" for the token embedding), `invocation_ids` the tokens from
    which on an aLoRA acts. `use_velora` changes how an adapter trains and which
    tensors it has, not what it does. `base_model` and `revision` are what the adapter
    says of its base. Raises `InvalidAdapter` naming the key at fault, and
    `UnsupportedAdapter` for keys that are not served together.
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
    use_dora: bool = False
    use_velora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    target_parameters: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[tuple[str, tuple[int, ...]], ...] = ()
    invocation_ids: tuple[int, ...] = ()
    ensure_weight_tying: bool = False
    base_model: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        _check_rank("r", self.rank)
        _check_alpha("lora_alpha", self.alpha)
        for key, rank in self.rank_pattern:
            _check_rank(f"rank_pattern.{key}", rank)
        for key, alpha in self.alpha_pattern:
            _check_alpha(f"alpha_pattern.{key}", alpha)
        if not self.target_modules and not self.target_parameters:
            raise InvalidAdapter(
                "target_modules is missing or empty: the adapter names no layer.",
                field="target_modules",
            )
        if self.bias not in _BIASES:
            raise invalid("bias", self.bias, f"one of {', '.join(_BIASES)}")
        self._check_lengths()
        self._check_layers()
        self._check_combinations()
        for key, pattern in self.patterns():
            check_pattern(key, pattern)

    def _check_lengths(self) -> None:
        for key in _LISTS:
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) > MAX_LISTED:
                raise InvalidAdapter(
                    f"{key} has {len(value):,} entries; at most {MAX_LISTED:,} are read.",
                    field=key,
                )

    def _check_layers(self) -> None:
        for key in ("layers_to_transform", "layers_pattern"):
            if getattr(self, key) and isinstance(self.target_modules, str):
                raise InvalidAdapter(f"{key} needs target_modules to be a list.", field=key)
        if self.layers_pattern and self.layers_to_transform is None:
            raise InvalidAdapter(
                "layers_pattern needs layers_to_transform.", field="layers_pattern"
            )

    def _check_combinations(self) -> None:
        variants = {
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            "velora_config": self.use_velora,
            "alora_invocation_tokens": bool(self.invocation_ids),
        }
        used = [key for key, value in variants.items() if value]
        exclusive = (self.use_dora and len(used) > 1) or (self.use_velora and self.invocation_ids)
        if exclusive or (self.target_parameters and used):
            keys = " and ".join(used + ["target_parameters"] * bool(self.target_parameters))
            raise InvalidAdapter(
                f"{keys} cannot go together: PEFT has no such adapter.", field=used[-1]
            )
        # Outside of the LoRA layers PEFT knows no invocation: these act from the first token on.
        early = {
            "bias": self.bias != "none",
            "modules_to_save": bool(self.modules_to_save),
            "trainable_token_indices": bool(self.trainable_token_indices),
        }
        for key in [key for key, value in early.items() if value and self.invocation_ids]:
            raise UnsupportedAdapter(
                f"alora_invocation_tokens with {key} is not served: "
                "one part would act before the invocation, the other after it.",
                field=key,
                fix=f"Train the adapter without {key}.",
            )

    @property
    def kind(self) -> str:
        """`lora` (scaling alpha/r), `rslora` (alpha/sqrt(r)), `dora` or `alora`."""
        if self.invocation_ids:
            return "alora"
        if self.use_dora:
            return "dora"
        return self._scaling_kind

    @property
    def _scaling_kind(self) -> str:
        return "rslora" if self.use_rslora else "lora"

    def scaling(self, rank: int, alpha: float) -> float:
        """The factor on B·A for one module (rsLoRA: Kalajdzievski, 2023)."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def patterns(self) -> list[tuple[str, str]]:
        """Every regular expression in the config, as (key, pattern)."""
        found = [("rank_pattern", key) for key, _ in self.rank_pattern]
        found += [("alpha_pattern", key) for key, _ in self.alpha_pattern]
        found += [("layers_pattern", key) for key in self.layers_pattern]
        found += [("modules_to_save", key) for key in self.modules_to_save]
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
        plain = {
            "kind": self._scaling_kind,
            "r": self.rank,
            "lora_alpha": float(self.alpha),
            "target_modules": _sorted_names(self.target_modules),
            "exclude_modules": _sorted_names(self.exclude_modules),
            "rank_pattern": [list(item) for item in self.rank_pattern],
            "alpha_pattern": [[key, float(value)] for key, value in self.alpha_pattern],
            "layers_to_transform": sorted(self.layers_to_transform or ()) or None,
            "layers_pattern": list(self.layers_pattern),
        }
        return plain | {key: value for key, value in self._extras().items() if value}

    def _extras(self) -> dict[str, Any]:
        # Left out where unset, so that a plain LoRA keeps the digest it always had.
        return {
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            "bias": self.bias if self.bias != "none" else None,
            "target_parameters": sorted(set(self.target_parameters)),
            "modules_to_save": sorted(set(self.modules_to_save)),
            "trainable_token_indices": sorted(
                [name, list(ids)] for name, ids in self.trainable_token_indices
            ),
            "alora_invocation_tokens": list(self.invocation_ids),
            "ensure_weight_tying": self.ensure_weight_tying,
        }

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Self:
        """Read the content of `adapter_config.json`.

        Raises `UnsupportedAdapter` for a PEFT kind or key that is not served,
        `InvalidAdapter` for a value that no PEFT release would accept.
        """
        check_keys(config)
        for key in ("r", "lora_alpha"):
            if key not in config:
                raise InvalidAdapter(f"{key} is missing from adapter_config.json.", field=key)
        read_mapping(config, "velora_config")  # an empty one, too, means VeLoRA
        layers = config.get("layers_to_transform")
        layers_pattern = read_names(config, "layers_pattern") or ()
        invocation = config.get("alora_invocation_tokens")
        return cls(
            rank=config["r"],
            alpha=config["lora_alpha"],
            use_rslora=read_bool(config, "use_rslora"),
            target_modules=read_names(config, "target_modules") or (),
            exclude_modules=read_names(config, "exclude_modules"),
            rank_pattern=tuple(read_mapping(config, "rank_pattern").items()),
            alpha_pattern=tuple(read_mapping(config, "alpha_pattern").items()),
            layers_to_transform=(
                None if layers is None else read_indices("layers_to_transform", layers)
            ),
            layers_pattern=(layers_pattern,) if isinstance(layers_pattern, str) else layers_pattern,
            use_dora=read_bool(config, "use_dora"),
            use_velora=config.get("velora_config") is not None,
            lora_bias=read_bool(config, "lora_bias"),
            bias=config.get("bias", "none"),
            target_parameters=read_list(config, "target_parameters"),
            modules_to_save=read_list(config, "modules_to_save"),
            trainable_token_indices=read_token_indices(config, "trainable_token_indices"),
            invocation_ids=read_indices("alora_invocation_tokens", invocation),
            ensure_weight_tying=read_bool(config, "ensure_weight_tying"),
            base_model=read_text(config, "base_model_name_or_path"),
            revision=read_text(config, "revision"),
        )


def _check_rank(key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
        raise invalid(key, value, f"an integer from 1 to {MAX_RANK}")


def _check_alpha(key: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # The comparison also refuses integers too large for a float, and NaN.
    if not number or not -1e9 <= value <= 1e9:  # type: ignore[operator]
        raise invalid(key, value, "a number from -1e9 to 1e9")


def _sorted_names(names: tuple[str, ...] | str | None) -> list[str] | str | None:
    return sorted(set(names)) if isinstance(names, tuple) else names
