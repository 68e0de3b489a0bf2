"""The kinds of PEFT adapters besides LoRA: which keys decide their result. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dynamic_lora_adapters.kinds.checks import (
    Check,
    boolean,
    integer,
    names,
    number,
    one_of,
    optional,
    pattern_map,
    text,
    token_ids,
)
from dynamic_lora_adapters.lora.spec import MAX_RANK

TARGET_KEYS = frozenset(
    {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
)
_NO_LAYERS = TARGET_KEYS - {"layers_to_transform", "layers_pattern"}
_NO_EXCLUDE = TARGET_KEYS - {"exclude_modules"}
_SIZE = 1 << 31

_RANK = integer(1, MAX_RANK)
_ALPHA = number(-1e9, 1e9)
_SEED = integer(0, (1 << 63) - 1)


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a config: its check, and the value that PEFT takes where it is missing."""

    check: Check
    default: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of adapter by its config.

    `keys` decide the result and are honoured. `harmless` ones describe training
    or initialisation. `refused` ones change the result when truthy, with what
    they do. `targets` are the keys that choose modules; a prompt has none.
    `conv1d`: the tensors mean the same on transformers' `Conv1D`.
    """

    name: str
    keys: Mapping[str, Key]
    harmless: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    targets: frozenset[str] = TARGET_KEYS
    conv1d: bool = False


_PROMPT_KEYS = {
    "num_virtual_tokens": Key(integer(1, 1 << 16), None),
    "token_dim": Key(optional(integer(1, 1 << 20)), None),
    "num_transformer_submodules": Key(optional(one_of(1)), None),
    "num_attention_heads": Key(optional(integer(1, 1 << 16)), None),
    "num_layers": Key(optional(integer(1, 1 << 16)), None),
}
_PROMPT_INIT = frozenset(
    {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
)
_ENCODER = frozenset(
    {
        "encoder_reparameterization_type",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_dropout",
        "init_weights",
        "prefix_projection",
    }
)
_INIT = frozenset({"init_weights"})
_LYCORIS_HARMLESS = frozenset(
    {"init_weights", "rank_dropout", "rank_dropout_scale", "module_dropout", "use_effective_conv2d"}
)
_PROJECTION = {
    "projection_prng_key": Key(_SEED, 0),
    "save_projection": Key(boolean, True),
}

TABLE: Mapping[str, Kind] = {
    "BEFT": Kind(name="BEFT", keys={}, harmless=_INIT, targets=frozenset({"target_modules"})),
    "BOFT": Kind(
        name="BOFT",
        keys={
            "boft_block_size": Key(integer(0, _SIZE), 4),
            "boft_block_num": Key(integer(0, _SIZE), 0),
            "boft_n_butterfly_factor": Key(integer(1, 64), 1),
        },
        harmless=_INIT | {"boft_dropout"},
    ),
    "C3A": Kind(
        name="C3A",
        keys={
            "block_size": Key(integer(1, _SIZE), 256),
            "block_size_pattern": Key(pattern_map(integer(1, _SIZE)), {}),
        },
        harmless=_INIT,
        targets=_NO_EXCLUDE,
    ),
    "DELORA": Kind(
        name="DeLoRA",
        keys={"r": Key(_RANK, 8), "rank_pattern": Key(pattern_map(_RANK), {})},
        # The bound is trained and saved; these say where it starts.
        harmless=_INIT | {"delora_lambda", "lambda_pattern", "module_dropout"},
    ),
    "FOURIERFT": Kind(
        name="FourierFT",
        keys={
            "n_frequency": Key(integer(1, _SIZE), 1000),
            "n_frequency_pattern": Key(pattern_map(integer(1, _SIZE)), {}),
            "scaling": Key(number(-1e9, 1e9), 150.0),
            "random_loc_seed": Key(_SEED, 777),
        },
        harmless=_INIT,
    ),
    "GRALORA": Kind(
        name="GraLoRA",
        keys={
            "r": Key(_RANK, 32),
            "hybrid_r": Key(integer(0, MAX_RANK), 0),
            "alpha": Key(_ALPHA, 64),
            "gralora_k": Key(integer(1, MAX_RANK), 2),
        },
        harmless=_INIT | {"gralora_dropout"},
        targets=_NO_EXCLUDE,
    ),
    "HIRA": Kind(
        name="HiRA",
        keys={"r": Key(_RANK, 32), "rank_pattern": Key(pattern_map(_RANK), {})},
        harmless=_INIT | {"hira_dropout"},
    ),
    "HRA": Kind(
        name="HRA",
        keys={"r": Key(_RANK, 8), "apply_GS": Key(boolean, False)},
        harmless=_INIT,
    ),
    "IA3": Kind(
        name="(IA)^3",
        keys={"feedforward_modules": Key(names, [])},
        harmless=frozenset({"init_ia3_weights"}),
        targets=_NO_LAYERS,
        conv1d=True,
    ),
    "LN_TUNING": Kind(name="LayerNorm tuning", keys={}, targets=_NO_LAYERS),
    "LOHA": Kind(
        name="LoHa",
        keys={
            "r": Key(_RANK, 8),
            "alpha": Key(_ALPHA, 8),
            "rank_pattern": Key(pattern_map(_RANK), {}),
            "alpha_pattern": Key(pattern_map(_ALPHA), {}),
        },
        harmless=_LYCORIS_HARMLESS,
    ),
    "LOKR": Kind(
        name="LoKr",
        keys={
            # A rank beyond every factor is how LoKr is told to keep them whole.
            "r": Key(integer(1, _SIZE), 8),
            "alpha": Key(_ALPHA, 8),
            "rank_pattern": Key(pattern_map(integer(1, _SIZE)), {}),
            "alpha_pattern": Key(pattern_map(_ALPHA), {}),
            "decompose_both": Key(boolean, False),
            "decompose_factor": Key(integer(-1, _SIZE), -1),
        },
        harmless=_LYCORIS_HARMLESS,
    ),
    "MISS": Kind(
        name="MiSS",
        keys={
            "r": Key(_RANK, 64),
            "mini_r": Key(_RANK, 1),
            # Not only where it starts: "bat" and "mini" compute another product.
            "init_weights": Key(one_of(True, False, "bat", "mini"), True),
        },
        harmless=frozenset({"miss_dropout"}),
    ),
    "OFT": Kind(
        name="OFT",
        keys={
            # PEFT searches from these numbers for one that divides the layer's input.
            "r": Key(integer(0, 1 << 16), 0),
            "oft_block_size": Key(integer(0, 1 << 16), 32),
            "coft": Key(boolean, False),
            "eps": Key(number(0, 1e9), 6e-5),
            "block_share": Key(boolean, False),
            "use_cayley_neumann": Key(boolean, True),
            "num_cayley_neumann_terms": Key(integer(1, 1000), 5),
        },
        harmless=_INIT | {"module_dropout"},
    ),
    "PREFIX_TUNING": Kind(
        name="prefix tuning", keys=_PROMPT_KEYS, harmless=_ENCODER, targets=frozenset()
    ),
    "PROMPT_TUNING": Kind(
        name="prompt tuning", keys=_PROMPT_KEYS, harmless=_PROMPT_INIT, targets=frozenset()
    ),
    "P_TUNING": Kind(name="p-tuning", keys=_PROMPT_KEYS, harmless=_ENCODER, targets=frozenset()),
    "RANDLORA": Kind(
        name="RandLoRA",
        keys={
            "r": Key(_RANK, 32),
            "randlora_alpha": Key(_ALPHA, 640),
            "sparse": Key(boolean, False),
            "very_sparse": Key(boolean, False),
            **_PROJECTION,
        },
        harmless=_INIT | {"randlora_dropout"},
        targets=_NO_EXCLUDE,
    ),
    "ROAD": Kind(
        name="RoAd",
        keys={
            "variant": Key(one_of("road_1", "road_2", "road_4"), "road_1"),
            "group_size": Key(integer(2, _SIZE), 64),
        },
        harmless=_INIT,
        targets=frozenset({"target_modules"}),
    ),
    "SHIRA": Kind(
        name="SHiRA",
        keys={"r": Key(_RANK, 32)},
        # The positions are saved, so how they were drawn does not count.
        harmless=_INIT | {"mask_type", "random_seed"},
        targets=frozenset({"target_modules"}),
    ),
    "TRAINABLE_TOKENS": Kind(
        name="trainable tokens",
        keys={"token_indices": Key(token_ids, [])},
        harmless=_INIT,
        targets=frozenset({"target_modules"}),
    ),
    "VBLORA": Kind(
        name="VB-LoRA",
        keys={
            "r": Key(_RANK, 4),
            "num_vectors": Key(integer(1, _SIZE), 256),
            "vector_length": Key(integer(1, _SIZE), 256),
            "topk": Key(integer(1, 4096), 2),
        },
        harmless=frozenset({"vblora_dropout", "init_vector_bank_bound", "init_logits_std"}),
        refused={"save_only_topk_weights": "the full logits are needed"},
    ),
    "VERA": Kind(
        name="VeRA",
        keys={"r": Key(_RANK, 256), **_PROJECTION},
        harmless=_INIT | {"d_initial", "vera_dropout"},
        targets=_NO_EXCLUDE,
        conv1d=True,
    ),
    "WAVEFT": Kind(
        name="WaveFT",
        keys={
            "n_frequency": Key(integer(1, _SIZE), 2592),
            "n_frequency_pattern": Key(pattern_map(integer(1, _SIZE)), {}),
            "proportional_parameters": Key(boolean, False),
            "scaling": Key(number(-1e9, 1e9), 25.0),
            "random_loc_seed": Key(_SEED, 777),
            "use_idwt": Key(boolean, True),
            "wavelet_family": Key(text, "db1"),
        },
        harmless=_INIT,
    ),
}
"""Each served kind by its `peft_type`."""

KINDS: Mapping[str, str] = {peft_type: kind.name for peft_type, kind in TABLE.items()}
"""The served kinds: `peft_type` to the name that people use."""

# PEFT corrects `fan_in_fan_out` by the class of each layer.
HARMLESS_KEYS = frozenset({"auto_mapping", "peft_version", "inference_mode", "fan_in_fan_out"})

REFUSED_KEYS: Mapping[str, str] = {
    "modules_to_save": "it replaces whole layers of the base model",
}

REFUSED_KINDS: Mapping[str, str] = {
    "ADALORA": "AdaLoRA prunes its ranks while it trains; convert it to a LoRA first",
    "ADAMSS": "it trains against a base model changed by its initialisation",
    "ADAPTION_PROMPT": "it adds a gated attention of its own to every layer",
    "CARTRIDGE": "its cache is trained from a frozen part of one prompt",
    "CPT": "its prompt is projected against the tokens of one training set",
    "DEFT": "its projection is not linear in what was trained",
    "FROD": "it rotates each layer by a decomposition of all layers together",
    "GLORA": "it makes a layer's bias depend on its weight",
    "LILY": "it routes between experts token by token",
    "MULTITASK_PROMPT_TUNING": "its prompt depends on the task's number in each request",
    "OSF": "it replaces the base weights by factors of their decomposition",
    "PEANUT": "it runs a network over the base weights",
    "POLY": "it routes between skills by a task's number in each request",
    "PSOFT": "it trains against a base model changed by its initialisation",
    "PVERA": "it samples its vectors",
    "SHADOW": "it runs a second model beside the base",
    "SUPERTUNING": "it overwrites single weights of the base",
    "TINYLORA": "it trains inside a decomposition of the base weights",
    "UNILORA": "all its layers are projections of one shared vector",
    "XLORA": "it routes between adapters token by token",
}
"""The kinds that are not served, with the reason."""
