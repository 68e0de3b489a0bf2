import os
from typing import Any

import pytest

from dynamic_lora_adapters.errors import AdapterError, InvalidAdapter, UnsupportedAdapter
from dynamic_lora_adapters.kinds import KINDS, KindSpec
from dynamic_lora_adapters.kinds.replica import calling_peft
from dynamic_lora_adapters.kinds.table import REFUSED_KINDS
from dynamic_lora_adapters.lora.spec import MAX_LISTED


def config(peft_type: str, **values: Any) -> dict[str, Any]:
    targets = {} if peft_type in PROMPTS else {"target_modules": ["q_proj"]}
    needed: dict[str, Any] = {"num_virtual_tokens": 4} if peft_type in PROMPTS else {}
    if peft_type == "TRAINABLE_TOKENS":
        needed = {"token_indices": [3]}
    return {"peft_type": peft_type, "task_type": "CAUSAL_LM", **targets, **needed, **values}


PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")


@pytest.mark.parametrize("peft_type", KINDS)
def test_every_key_of_peft_is_known(peft_type: str) -> None:
    """No key of the installed release is refused only because nobody has looked at it."""
    import dataclasses

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    from dynamic_lora_adapters.kinds.table import HARMLESS_KEYS, REFUSED_KEYS, TABLE

    kind = TABLE[peft_type]
    common = {"peft_type", "task_type", "base_model_name_or_path", "revision", "bias"}
    known = kind.keys.keys() | kind.harmless | kind.targets | kind.refused.keys()
    known |= HARMLESS_KEYS | REFUSED_KEYS.keys() | common
    fields = dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)])
    assert {field.name for field in fields} - known == set()
    assert (kind.targets | kind.keys.keys()) - {field.name for field in fields} == set()


@pytest.mark.parametrize("peft_type", KINDS)
def test_defaults_are_those_of_peft(peft_type: str) -> None:
    import dataclasses

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    from dynamic_lora_adapters.kinds.table import TABLE

    for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]):
        key = TABLE[peft_type].keys.get(field.name)
        # IA3 has no default for its feed-forward modules where it does not know the model.
        if key is None or field.name == "feedforward_modules":
            continue
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        assert key.default == default, field.name


def test_every_peft_type_is_served_or_refused() -> None:
    from peft.utils import PeftType

    known = {"LORA", *KINDS, *REFUSED_KINDS}
    assert {kind.value for kind in PeftType} == known
    assert not KINDS.keys() & REFUSED_KINDS.keys()


@pytest.mark.parametrize("peft_type", REFUSED_KINDS)
def test_other_kinds_are_refused_with_the_reason(peft_type: str) -> None:
    with pytest.raises(UnsupportedAdapter) as caught:
        KindSpec.parse({"peft_type": peft_type})
    reason = REFUSED_KINDS[peft_type]
    assert caught.value.message == f"peft_type {peft_type!r} is not served: {reason}."
    assert caught.value.field == "peft_type"


BAD: list[tuple[dict[str, Any], type[AdapterError], str]] = [
    ({}, InvalidAdapter, "peft_type is missing"),
    ({"peft_type": "NEW"}, UnsupportedAdapter, "'NEW' is not served: this kind is not known"),
    (config("LOHA", task_type="SEQ_CLS"), UnsupportedAdapter, "task_type 'SEQ_CLS'"),
    (config("PROMPT_TUNING", task_type=None), UnsupportedAdapter, "task_type None"),
    (config("PREFIX_TUNING", task_type="SEQ_2_SEQ_LM"), UnsupportedAdapter, "SEQ_2_SEQ_LM"),
    (config("OFT", bias="all"), UnsupportedAdapter, "bias = 'all' is not served: it trains"),
    (config("VERA", modules_to_save=["lm_head"]), UnsupportedAdapter, "replaces whole layers"),
    (config("IA3", layers_to_transform=[1]), UnsupportedAdapter, "layers_to_transform = [1]"),
    (config("LOHA", new_key=3), UnsupportedAdapter, "new_key = 3 is not served: no LoHa adapter"),
    (
        config("VBLORA", save_only_topk_weights=True),
        UnsupportedAdapter,
        "the full logits are needed",
    ),
    (config("LOHA", r=0), InvalidAdapter, "r must be an integer from 1 to 4096, not 0"),
    (config("LOHA", r=True), InvalidAdapter, "r must be an integer from 1 to 4096, not True"),
    (
        config("LOHA", alpha="8"),
        InvalidAdapter,
        "alpha must be a number from -1e+09 to 1e+09, not '8'",
    ),
    (config("LOHA", alpha=float("nan")), InvalidAdapter, "not nan"),
    (config("LOKR", decompose_both=1), InvalidAdapter, "decompose_both must be true or false"),
    (config("HIRA", rank_pattern=[3]), InvalidAdapter, "rank_pattern must be an object, not [3]"),
    (config("LOHA", rank_pattern={"q": 0}), InvalidAdapter, "rank_pattern.q must be an integer"),
    (
        config("C3A", block_size_pattern={f"w{i}": 2 for i in range(MAX_LISTED + 1)}),
        InvalidAdapter,
        "block_size_pattern has 32,769 entries; at most 32,768 are read",
    ),
    (config("MISS", init_weights="cat"), InvalidAdapter, "init_weights must be one of True, False"),
    (config("MISS", init_weights=1), InvalidAdapter, "not 1"),
    (config("ROAD", variant="road_3"), InvalidAdapter, "variant must be one of 'road_1'"),
    (config("WAVEFT", wavelet_family=""), InvalidAdapter, "wavelet_family must be a non-empty"),
    (config("IA3", feedforward_modules=[""]), InvalidAdapter, "list of non-empty strings"),
    (config("TRAINABLE_TOKENS", token_indices=[1, 1]), InvalidAdapter, "each once, not [1, 1]"),
    (config("TRAINABLE_TOKENS", token_indices=[]), InvalidAdapter, "a non-empty list of token ids"),
    (config("PROMPT_TUNING", num_virtual_tokens=0), InvalidAdapter, "from 1 to 65536, not 0"),
    (config("PROMPT_TUNING", num_transformer_submodules=2), InvalidAdapter, "one of 1, not 2"),
    (config("LOHA", target_modules=[]), InvalidAdapter, "target_modules is missing or empty"),
    (config("LOHA", target_modules="("), InvalidAdapter, "in target_modules is not a regular"),
    (config("C3A", block_size_pattern={"(": 2}), InvalidAdapter, "'(' in block_size_pattern"),
    (config("OFT", r=1 << 30), InvalidAdapter, "r must be an integer from 0 to 65536"),
    (config("P_TUNING", revision=3), InvalidAdapter, "revision must be a string or null, not 3"),
    (config("IA3", feedforward_modules="("), InvalidAdapter, "'(' in feedforward_modules"),
]


@pytest.mark.parametrize(("content", "error", "text"), BAD)
def test_bad_configs_are_refused_by_name(
    content: dict[str, Any], error: type[AdapterError], text: str
) -> None:
    with pytest.raises(error) as caught:
        KindSpec.parse(content)
    assert text in caught.value.message


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_key_that_says_nothing_passes(value: object) -> None:
    assert KindSpec.parse(config("LOHA", new_key=value)).peft_type == "LOHA"


def canonical(peft_type: str, **changes: Any) -> dict[str, Any]:
    return KindSpec.parse(config(peft_type, **changes)).canonical()


def test_canonical_has_one_spelling() -> None:
    plain = canonical("LOHA")
    assert plain["kind"] == "loha"
    assert plain["r"] == 8
    assert plain == canonical("LOHA", r=8, alpha=8.0, rank_dropout=0.5)
    about = {"base_model_name_or_path": "org/base", "peft_version": "0.0", "task_type": None}
    assert plain == canonical("LOHA", **about)
    two = ["v_proj", "q_proj"]
    assert canonical("LOHA", target_modules=two) == canonical("LOHA", target_modules=two[::-1])


@pytest.mark.parametrize(
    ("peft_type", "changes"),
    [
        ("LOHA", {"r": 4}),
        ("LOHA", {"alpha": 4}),
        ("LOHA", {"alpha": 8.5}),
        ("LOHA", {"rank_pattern": {"q_proj": 2}}),
        ("LOHA", {"target_modules": ["v_proj"]}),
        ("LOHA", {"exclude_modules": ["v_proj"]}),
        ("LOHA", {"layers_to_transform": [0]}),
        ("VERA", {"projection_prng_key": 4}),
        ("OFT", {"num_cayley_neumann_terms": 4}),
        ("TRAINABLE_TOKENS", {"token_indices": [4]}),
        ("PREFIX_TUNING", {"num_attention_heads": 2}),
    ],
)
def test_what_changes_the_result_changes_the_canonical_form(
    peft_type: str, changes: dict[str, Any]
) -> None:
    assert canonical(peft_type) != canonical(peft_type, **changes)


def test_the_order_of_patterns_counts() -> None:
    one, other = {"q": 1, "proj": 2}, {"proj": 2, "q": 1}
    assert canonical("LOHA", rank_pattern=one) != canonical("LOHA", rank_pattern=other)


def test_the_adapter_says_what_its_base_is() -> None:
    spec = KindSpec.parse(config("LOHA", base_model_name_or_path="org/base", revision="main"))
    assert spec.name == "LoHa"
    assert (spec.base_model, spec.revision) == ("org/base", "main")
    assert spec.targets is not None
    assert spec.targets.target_modules == ("q_proj",)
    assert KindSpec.parse(config("P_TUNING")).targets is None


@pytest.mark.parametrize("set_before", [True, False])
def test_compilers_that_peft_leaves_in_the_environment_are_forgotten(
    set_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its BOFT sets CC and CXX to compile for CUDA, and does not undo it where that fails."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    if set_before:
        monkeypatch.setenv("CXX", "clang++")
    expected = dict(os.environ)
    with (
        pytest.raises(InvalidAdapter, match="no compiler"),
        calling_peft(KindSpec.parse(config("BOFT", boft_block_size=4))),
    ):
        os.environ.update(CC="gcc", CXX="gcc")
        raise RuntimeError("no compiler")
    assert dict(os.environ) == expected
