"""What the config of an adapter that is no LoRA says, read strictly. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from dynamic_lora_adapters.errors import InvalidAdapter, UnsupportedAdapter
from dynamic_lora_adapters.kinds.table import (
    HARMLESS_KEYS,
    KINDS,
    REFUSED_KEYS,
    REFUSED_KINDS,
    TABLE,
    TARGET_KEYS,
    Kind,
)
from dynamic_lora_adapters.lora.config_values import invalid, is_unset, read_text, refusal
from dynamic_lora_adapters.lora.spec import LoraSpec

_COMMON_KEYS = frozenset({"peft_type", "task_type", "base_model_name_or_path", "revision", "bias"})


@dataclass(frozen=True, slots=True, kw_only=True)
class KindSpec:
    """The part of a PEFT config that decides the result of an adapter that is no LoRA.

    `values` holds the kind's own keys, checked, with PEFT's default where one is
    missing. `targets` chooses the modules exactly as a LoRA's config does, its
    rank and alpha meaning nothing; None for a prompt, which has no targets.
    `base_model` and `revision` are what the adapter says of its base.
    """

    peft_type: str
    values: Mapping[str, Any]
    targets: LoraSpec | None
    base_model: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """The name that people use for this kind."""
        return KINDS[self.peft_type]

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Self:
        """Read the content of `adapter_config.json`.

        Raises `UnsupportedAdapter` for a kind or key that is not served,
        `InvalidAdapter` for a value that no PEFT release would accept.
        """
        peft_type, kind = _kind(config)
        _check_task(config, kind)
        _check_keys(config, kind)
        values = {key: config.get(key, known.default) for key, known in kind.keys.items()}
        for key, value in values.items():
            kind.keys[key].check(key, value)
        return cls(
            peft_type=peft_type,
            values=values,
            targets=_targets(config, kind, values),
            base_model=read_text(config, "base_model_name_or_path"),
            revision=read_text(config, "revision"),
        )

    def canonical(self) -> dict[str, Any]:
        """The result-changing values in one spelling, for the content digest."""
        targets = self.targets.canonical() if self.targets is not None else {}
        values = {key: _one_spelling(value) for key, value in self.values.items()}
        return {
            "kind": self.peft_type.lower(),
            **{key: targets[key] for key in sorted(TARGET_KEYS & targets.keys())},
            **values,
        }


def _one_spelling(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    # The order of patterns counts and survives; objects are sorted in the digest.
    if isinstance(value, dict):
        return [[key, _one_spelling(item)] for key, item in value.items()]
    return value


def _kind(config: Mapping[str, Any]) -> tuple[str, Kind]:
    peft_type = config.get("peft_type")
    if peft_type is not None and not isinstance(peft_type, str):
        raise invalid("peft_type", peft_type, "a name")
    if not peft_type:
        raise InvalidAdapter(
            "peft_type is missing: this is not PEFT's adapter_config.json.", field="peft_type"
        )
    if peft_type in TABLE:
        return peft_type, TABLE[peft_type]
    reason = REFUSED_KINDS.get(peft_type, "this kind is not known")
    raise UnsupportedAdapter(
        f"peft_type {peft_type!r} is not served: {reason}.",
        field="peft_type",
        fix=f"The kinds that are served are LORA, {', '.join(sorted(TABLE))}.",
    )


def _check_task(config: Mapping[str, Any], kind: Kind) -> None:
    task = config.get("task_type")
    # Without a task PEFT puts no prompt before anything.
    if task == "CAUSAL_LM" or (task is None and kind.targets):
        return
    raise UnsupportedAdapter(f"task_type {task!r} is not served; CAUSAL_LM is.", field="task_type")


def _check_keys(config: Mapping[str, Any], kind: Kind) -> None:
    if config.get("bias", "none") not in (None, "none"):
        raise refusal("bias", config["bias"], "it trains biases of the base model")
    passed = _COMMON_KEYS | HARMLESS_KEYS | kind.targets | kind.harmless | kind.keys.keys()
    refused = {**REFUSED_KEYS, **kind.refused}
    for key in sorted(config.keys() - passed):
        if not is_unset(config[key]):
            reason = refused.get(key, f"no {kind.name} adapter is known to have this key")
            raise refusal(key, config[key], reason)


def _targets(config: Mapping[str, Any], kind: Kind, values: Mapping[str, Any]) -> LoraSpec | None:
    if not kind.targets:
        return None
    # The same code decides on the targets of a LoRA; it also proves that every
    # pattern is sound and quick to match, so the patterns of other keys go along.
    common = {key: config.get(key) for key in kind.targets | {"task_type"}}
    patterns = [pattern for key, value in values.items() for pattern in _patterns(key, value)]
    try:
        return LoraSpec.parse(
            {
                "peft_type": "LORA",
                "r": 1,
                "lora_alpha": 1,
                "rank_pattern": dict.fromkeys(patterns, 1),
                **common,
            }
        )
    except InvalidAdapter as error:
        if error.field == "rank_pattern":
            keys = ", ".join(sorted(key for key, value in values.items() if _patterns(key, value)))
            raise InvalidAdapter(
                error.message.replace("rank_pattern", keys), field=keys, fix=error.fix
            ) from None
        raise


def _patterns(key: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return list(value)
    return [value] if key == "feedforward_modules" and isinstance(value, str) else []
