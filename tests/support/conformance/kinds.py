"""The rows of the table: what PEFT is asked to make, kind by kind.

A kind is a recipe for PEFT and nothing else: whether the server serves it is
found out by publishing the checkpoint.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
from peft import PeftConfig

from tests.support.conformance.architectures import Layout

INVOCATION_IDS = (11, 40, 200)
"""Tokens in the longer prompts: what invokes an aLoRA, and what some kinds retrain."""

Recipe = Callable[[Layout, int], PeftConfig]
"""A config for the layout; `size` is the rank or what comes next to it, a multiple of 4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One row.

    `tied` asks for a base whose head shares the input embedding, or does not.
    `converted` saves against the original base (PiSSA, OLoRA), `pickled`
    without safetensors, `fitted` initialises from data (EVA). `edits` are
    keys that the saved config gets where PEFT cannot write them here.
    """

    recipe: Recipe
    tied: bool | None = None
    converted: bool = False
    pickled: bool = False
    fitted: bool = False
    edits: Mapping[str, Any] = field(default_factory=dict)


def _lora(**keys: Any) -> Recipe:
    """A LoRA; keys that are functions are called with the layout."""

    def build(layout: Layout, size: int) -> PeftConfig:
        given = {key: value(layout) if callable(value) else value for key, value in keys.items()}
        targets = {"target_modules": layout.targets}
        return peft.LoraConfig(
            task_type="CAUSAL_LM", r=size, lora_alpha=2 * size, **targets | given
        )

    return build


def _other(name: str, size_key: str | None, **keys: Any) -> Recipe:
    """A config class of PEFT's by name, with the size under its own key."""

    def build(layout: Layout, size: int) -> PeftConfig:
        sizes = {} if size_key is None else {size_key: size}
        given = {key: value(layout) if callable(value) else value for key, value in keys.items()}
        config: PeftConfig = getattr(peft, name)(task_type="CAUSAL_LM", **sizes, **given)
        return config

    return build


def _targets(layout: Layout) -> list[str]:
    return layout.targets


def _with(part: str) -> Callable[[Layout], list[str]]:
    return lambda layout: [*layout.targets, getattr(layout, part)]


def _saved(part: str) -> Callable[[Layout], list[str]]:
    return lambda layout: [getattr(layout, part)]


_LORA: Mapping[str, Kind] = {
    "LoRA": Kind(recipe=_lora()),
    "rsLoRA": Kind(recipe=_lora(use_rslora=True)),
    "rank_pattern and alpha_pattern": Kind(
        recipe=_lora(
            rank_pattern=lambda layout: {layout.attention[0]: 6},
            alpha_pattern=lambda layout: {rf"1\..*{layout.attention[-1]}": 3},
        )
    ),
    "layers_to_transform": Kind(recipe=_lora(layers_to_transform=[1])),
    "layers_pattern": Kind(
        recipe=_lora(layers_to_transform=[0], layers_pattern=lambda layout: layout.layers)
    ),
    "target_modules: all-linear": Kind(recipe=_lora(target_modules="all-linear")),
    "target_modules: regex": Kind(
        recipe=_lora(target_modules=lambda layout: rf".*\.1\..*({'|'.join(layout.attention)})")
    ),
    "exclude_modules": Kind(
        recipe=_lora(
            target_modules="all-linear", exclude_modules=lambda layout: [layout.attention[-1]]
        )
    ),
    "target_parameters": Kind(
        recipe=_lora(
            # Alone where there are no experts: PEFT lets it pass if anything else is found.
            target_modules=lambda layout: [] if layout.feedforward else list(layout.attention),
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        )
    ),
    "fan_in_fan_out": Kind(recipe=_lora(fan_in_fan_out=True)),
    "lora_bias": Kind(recipe=_lora(lora_bias=True)),
    "bias: all": Kind(recipe=_lora(bias="all")),
    "bias: lora_only": Kind(recipe=_lora(bias="lora_only")),
    "DoRA": Kind(recipe=_lora(use_dora=True)),
    "aLoRA": Kind(recipe=_lora(alora_invocation_tokens=list(INVOCATION_IDS))),
}

_EMBEDDINGS: Mapping[str, Kind] = {
    f"{name} ({'tied' if tied else 'untied'})": Kind(recipe=recipe, tied=tied)
    for name, recipe in {
        "LoRA on the embedding": _lora(target_modules=_with("embedding")),
        "LoRA on the head": _lora(target_modules=_with("head")),
        "modules_to_save: embedding": _lora(modules_to_save=_saved("embedding")),
        "modules_to_save: head": _lora(modules_to_save=_saved("head")),
        "trainable_token_indices": _lora(trainable_token_indices=[5, *INVOCATION_IDS]),
    }.items()
    for tied in (False, True)
}

_INITIALISATIONS: Mapping[str, Kind] = {
    "PiSSA": Kind(recipe=_lora(init_lora_weights="pissa")),
    "PiSSA, converted": Kind(recipe=_lora(init_lora_weights="pissa"), converted=True),
    "OLoRA": Kind(recipe=_lora(init_lora_weights="olora")),
    "OLoRA, converted": Kind(recipe=_lora(init_lora_weights="olora"), converted=True),
    "EVA": Kind(
        recipe=_lora(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.5)), fitted=True
    ),
    # Making one takes bitsandbytes and a GPU; what PEFT leaves on disk is known.
    "LoftQ": Kind(
        recipe=_lora(),
        edits={"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
    ),
    "pickled checkpoint": Kind(recipe=_lora(), pickled=True),
}

_OTHERS: Mapping[str, Kind] = {
    "IA3": Kind(
        recipe=_other(
            "IA3Config",
            None,
            target_modules=_targets,
            feedforward_modules=lambda layout: list(layout.feedforward),
        )
    ),
    "VeRA": Kind(recipe=_other("VeraConfig", "r", target_modules=_targets)),
    "LoHa": Kind(recipe=_other("LoHaConfig", "r", target_modules=_targets, alpha=8)),
    "LoKr": Kind(recipe=_other("LoKrConfig", "r", target_modules=_targets, alpha=8)),
    "BOFT": Kind(recipe=_other("BOFTConfig", "boft_block_size", target_modules=_targets)),
    "OFT": Kind(recipe=_other("OFTConfig", "oft_block_size", target_modules=_targets)),
    "prompt tuning": Kind(recipe=_other("PromptTuningConfig", "num_virtual_tokens")),
    "prefix tuning": Kind(recipe=_other("PrefixTuningConfig", "num_virtual_tokens")),
    "P-tuning": Kind(recipe=_other("PromptEncoderConfig", "num_virtual_tokens")),
    "AdaLoRA": Kind(
        recipe=_other("AdaLoraConfig", "init_r", target_modules=_targets, total_step=100)
    ),
    "FourierFT": Kind(recipe=_other("FourierFTConfig", "n_frequency", target_modules=_targets)),
    "HRA": Kind(recipe=_other("HRAConfig", "r", target_modules=_targets)),
    "MiSS": Kind(recipe=_other("MissConfig", "r", target_modules=_targets)),
    "RandLoRA": Kind(recipe=_other("RandLoraConfig", "r", target_modules=_targets)),
    "LN tuning": Kind(
        recipe=_other("LNTuningConfig", None, target_modules=lambda layout: [layout.norm])
    ),
    "LN tuning: q_norm and k_norm": Kind(
        recipe=_other("LNTuningConfig", None, target_modules=["q_norm", "k_norm"])
    ),
}

KINDS: Mapping[str, Kind] = {
    **_LORA,
    "modules_to_save: norm": Kind(recipe=_lora(modules_to_save=_saved("norm"))),
    **_EMBEDDINGS,
    **_INITIALISATIONS,
    **_OTHERS,
}
"""Every row of the table by its name, in order."""
