"""Every kind is held against PEFT's own logits, on several architectures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from dynamic_lora_adapters.base_weights import ModelWeights
from dynamic_lora_adapters.kinds import KINDS, read_kind
from dynamic_lora_adapters.kinds.reader import READERS
from dynamic_lora_adapters.terms import AdapterTerms
from tests.adapters.kinds.checkpoints import edit_tensors, make, make_config, peft_logits
from tests.support.apply_terms import logits
from tests.support.geometry import geometry_of
from tests.support.models import TINY_MODELS

TOKENS = torch.tensor([5, 9, 33, 120, 7, 250, 64, 11])
LINEARS = ["q_proj", "v_proj", "down_proj"]
OPT_LINEARS = ["q_proj", "v_proj", "fc2"]
LIST: dict[str, Any] = {"target_modules": LINEARS}

# A name for the case, the config, and what it is made of. All but prompts and
# norms are tried on several families.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj", "fc2", "mlp.c_proj"]}),
    "ia3-outputs": ("IA3Config", {"feedforward_modules": []}),
    "vera": ("VeraConfig", {"r": 8}),
    "vera-key": ("VeraConfig", {"r": 8, "save_projection": False, "projection_prng_key": 7}),
    "loha-factors": ("LoHaConfig", {"r": 3, "alpha": 5}),
    "loha-negative": ("LoHaConfig", {"r": 2, "alpha": -4}),
    "loha-dense": ("LoHaConfig", {"r": 8, "alpha": 8}),
    "loha-patterns": (
        "LoHaConfig",
        {"r": 2, "alpha": 4, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 9}},
    ),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 4}),
    "lokr-both": ("LoKrConfig", {"r": 2, "alpha": 4, "decompose_both": True}),
    "lokr-whole": ("LoKrConfig", {"r": 10_000, "alpha": 10_000}),
    "lokr-factor": ("LoKrConfig", {"r": 3, "alpha": 3, "decompose_factor": 4}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 8}),
    "oft-cayley": ("OFTConfig", {"r": 4, "oft_block_size": 0, "use_cayley_neumann": False}),
    "oft-shared": ("OFTConfig", {"oft_block_size": 8, "block_share": True}),
    "oft-constrained": ("OFTConfig", {"oft_block_size": 8, "coft": True, "eps": 0.5}),
    "boft": ("BOFTConfig", {"boft_block_size": 8}),
    "boft-blocks": ("BOFTConfig", {"boft_block_size": 0, "boft_block_num": 4}),
    "hra": ("HRAConfig", {"r": 4}),
    "hra-gs": ("HRAConfig", {"r": 4, "apply_GS": True}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 60, "random_loc_seed": 3}),
    "c3a": ("C3AConfig", {"block_size": 16}),
    "randlora": ("RandLoraConfig", {"r": 4, "randlora_alpha": 8}),
    "randlora-key": ("RandLoraConfig", {"r": 4, "randlora_alpha": 8, "save_projection": False}),
    "beft": ("BeftConfig", {}),
    "road": ("RoadConfig", {"group_size": 16}),
    "road-2": ("RoadConfig", {"group_size": 16, "variant": "road_2"}),
    "road-4": ("RoadConfig", {"group_size": 16, "variant": "road_4"}),
    "shira": ("ShiraConfig", {"r": 4}),
    "miss": ("MissConfig", {"r": 8}),
    "miss-bat": ("MissConfig", {"r": 8, "init_weights": "bat"}),
    "miss-mini": ("MissConfig", {"r": 8, "mini_r": 4, "init_weights": "mini"}),
    "delora": ("DeloraConfig", {"r": 4, "rank_pattern": {"q_proj": 2}}),
    "gralora": ("GraloraConfig", {"r": 8, "alpha": 16}),
    "gralora-hybrid": ("GraloraConfig", {"r": 8, "alpha": 16, "hybrid_r": 4}),
    "hira": ("HiraConfig", {"r": 4}),
    "waveft": ("WaveFTConfig", {"n_frequency": 60, "wavelet_family": "db2"}),
    "waveft-plain": ("WaveFTConfig", {"n_frequency": 60, "use_idwt": False}),
    "vblora": ("VBLoRAConfig", {"r": 3, "vector_length": 16, "num_vectors": 20}),
}
# Those whose random values are large or small by nature.
SPREADS = {"fourierft": 4.0, "vera": 1.0, "vera-key": 1.0, "randlora": 1.0, "vblora": 1.0}


def check(
    model: PreTrainedModel, folder: Path, config: dict[str, Any], *, tolerance: float = 1e-4
) -> AdapterTerms:
    """Read the adapter, hold it against PEFT, and return its terms."""
    geometry = geometry_of(model)
    terms = read_kind(folder, config, geometry, ModelWeights(model))
    ours = logits(model, terms, TOKENS)
    theirs = peft_logits(model, folder, TOKENS)
    plain = logits(model, AdapterTerms(), TOKENS)
    assert (theirs - plain).abs().max() > 0.01, "the adapter changes next to nothing"
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
    return terms


def test_every_kind_of_the_table_has_a_reader() -> None:
    assert READERS.keys() == KINDS.keys()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "opt"])
@pytest.mark.parametrize("case", CASES)
def test_linear_kinds_agree_with_peft(case: str, family: str, tmp_path: Path) -> None:
    name, values = CASES[case]
    model = TINY_MODELS[family]()
    targets = OPT_LINEARS if family == "opt" else LINEARS
    values = dict(values)
    if "feedforward_modules" in values:
        values["feedforward_modules"] = [m for m in values["feedforward_modules"] if m in targets]
    config = make(
        tmp_path,
        model,
        make_config(name, target_modules=targets, **values),
        spread=SPREADS.get(case, 0.2),
    )
    terms = check(model, tmp_path, config)
    assert set(terms.linears) == {
        path for path in geometry_of(model).linears if path.rsplit(".", 1)[-1] in targets
    }


def test_positions_that_were_saved_on_windows(tmp_path: Path) -> None:
    """There PEFT writes them as float32."""
    model = TINY_MODELS["llama"]()
    config = make(tmp_path, model, make_config("ShiraConfig", r=4, **LIST))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {k: v.float() for k, v in tensors.items() if k.endswith("shira_indices")}

    edit_tensors(tmp_path, change)
    check(model, tmp_path, config)


@pytest.mark.parametrize("case", ["ia3", "ia3-outputs", "vera"])
def test_conv1d_layers(case: str, tmp_path: Path) -> None:
    name, values = CASES[case]
    targets = ["c_attn", "mlp.c_proj"]
    values = dict(values)
    if values.get("feedforward_modules"):
        values["feedforward_modules"] = ["mlp.c_proj"]
    values["fan_in_fan_out"] = True
    model = TINY_MODELS["gpt2"]()
    config = make(tmp_path, model, make_config(name, target_modules=targets, **values), spread=0.5)
    check(model, tmp_path, config)


def test_kinds_choose_layers_as_lora_does(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    settings = {
        "target_modules": r".*\.(q_proj|up_proj)",
        "exclude_modules": ["model.layers.0.mlp.up_proj"],
    }
    config = make(tmp_path, model, make_config("LoHaConfig", **settings))
    terms = check(model, tmp_path, config)
    assert set(terms.linears) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }


def test_layers_to_transform(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    settings = {"target_modules": ["k_proj"], "layers_to_transform": [1]}
    config = make(tmp_path, model, make_config("LoKrConfig", **settings))
    assert set(check(model, tmp_path, config).linears) == {"model.layers.1.self_attn.k_proj"}


def test_the_smaller_form_is_chosen(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()

    def q_proj(folder: Path, name: str, **values: Any) -> Any:
        settings = {"target_modules": ["q_proj"]}
        config = make(folder, model, make_config(name, **settings, **values))
        return check(model, folder, config).linears["model.layers.0.self_attn.q_proj"]

    factors = q_proj(tmp_path / "a", "LoHaConfig", r=3, alpha=6)
    assert factors.dense is None
    assert factors.a.shape == (9, 64)
    assert factors.b.shape == (64, 9)
    assert (factors.rank, factors.scaling) == (3, 2.0)
    assert q_proj(tmp_path / "b", "LoHaConfig", r=6, alpha=6).dense.shape == (64, 64)
    kronecker = q_proj(tmp_path / "c", "LoKrConfig", r=2, alpha=2, decompose_both=True)
    assert kronecker.a.shape == (4, 64)
    scaled = q_proj(tmp_path / "d", "IA3Config", feedforward_modules=[])
    assert scaled.scale.shape == (64,)
    assert scaled.dense is None


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ["input_layernorm", "post_attention_layernorm", "norm"]),
        ("gemma3_text", ["pre_feedforward_layernorm", "q_norm"]),
        ("opt", ["self_attn_layer_norm", "final_layer_norm"]),
        ("llama", r".*\.1\.\w+_layernorm|model\.norm"),
        ("opt", r".*_norm"),
    ],
)
@pytest.mark.parametrize("excluded", [None, r".*\.0\..*_norm"])
def test_norms_are_replaced(
    family: str, targets: list[str] | str, excluded: str | None, tmp_path: Path
) -> None:
    model = TINY_MODELS[family]()
    settings = {"target_modules": targets, "exclude_modules": excluded}
    terms = check(model, tmp_path, make(tmp_path, model, make_config("LNTuningConfig", **settings)))
    assert terms.overrides
    assert not terms.linears
    expected = {"weight", "bias"} if family == "opt" else {"weight"}
    assert all(set(override.parameters) == expected for override in terms.overrides.values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_trained_tokens_are_added(family: str, tied: bool, tmp_path: Path) -> None:
    model = TINY_MODELS[family](tie_word_embeddings=tied)
    settings = {"token_indices": [120, 5, 2]}
    config = make(tmp_path, model, make_config("TrainableTokensConfig", **settings), spread=0.5)
    terms = check(model, tmp_path, config)
    (embedding,) = terms.embeddings.values()
    assert embedding.token_ids is not None
    assert embedding.token_ids.tolist() == [120, 5, 2]
    assert set(terms.linears) == ({"lm_head"} if tied else set())


PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {}),
    "p-mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 16}),
    "p-lstm": (
        "PromptEncoderConfig",
        {"encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"},
    ),
    "prefix": ("PrefixTuningConfig", {}),
    "prefix-projected": (
        "PrefixTuningConfig",
        {"prefix_projection": True, "encoder_hidden_size": 16},
    ),
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "opt"])
@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_agree_with_peft(case: str, family: str, tmp_path: Path) -> None:
    name, values = PROMPTS[case]
    model = TINY_MODELS[family]()
    settings = {"num_virtual_tokens": 3}
    config = make(tmp_path, model, make_config(name, **settings, **values), spread=0.5)
    prompt = check(model, tmp_path, config).prompt
    assert prompt is not None
    assert prompt.num_tokens == 3
    if name == "PrefixTuningConfig":
        assert len(prompt.keys) == len(prompt.values) == 2
        heads = model.config.num_attention_heads if family == "opt" else 2
        assert prompt.keys[0].shape == (3, heads, 16)
    else:
        assert prompt.embeddings is not None
        assert prompt.embeddings.shape == (3, 64)


def test_half_precision_is_read_as_fp32(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    config = make(tmp_path, model, make_config("LoHaConfig", **LIST))
    edit_tensors(
        tmp_path, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()})
    )
    terms = check(model, tmp_path, config)
    assert {terms.linears[path].dense.dtype for path in terms.linears} == {torch.float32}  # type: ignore[union-attr]


def test_every_served_kind_has_a_case() -> None:
    names = [name for name, _ in [*CASES.values(), *PROMPTS.values()]]
    tried = {str(make_config(name, **_needed(name)).peft_type) for name in names}
    expected = {f"PeftType.{kind}" for kind in KINDS}
    assert tried | {"PeftType.LN_TUNING", "PeftType.TRAINABLE_TOKENS"} == expected


def _needed(name: str) -> dict[str, Any]:
    return {"feedforward_modules": [], "target_modules": []} if name == "IA3Config" else {}
