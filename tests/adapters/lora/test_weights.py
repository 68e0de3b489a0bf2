from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from dynamic_lora_adapters import (
    BaseGeometry,
    IncompatibleAdapter,
    InvalidAdapter,
    LinearTerms,
    LoraSpec,
    read_adapter,
)
from dynamic_lora_adapters.files.json_file import read_json_object
from dynamic_lora_adapters.lora.weights import content_digest
from tests.support.adapters import ALL_TARGETS, edit_config, load_with_peft, make_adapter
from tests.support.models import TINY_MODELS
from tests.support.uploads import Q_A, Q_B, WEIGHTS_FILE, copy_adapter, edit_tensors


def read_spec(folder: Path) -> LoraSpec:
    return LoraSpec.parse(read_json_object(folder / "adapter_config.json"))


def read(folder: Path, geometry: BaseGeometry) -> Mapping[str, LinearTerms]:
    return read_adapter(folder, read_spec(folder), geometry).linears


def digest(folder: Path, card: dict[str, Any] | None = None) -> str:
    return content_digest(read_spec(folder), folder / WEIGHTS_FILE, card)


def delta_weight(module: Any) -> torch.Tensor:
    """PEFT's own s * B @ A."""
    delta: torch.Tensor = module.get_delta_weight("default").detach()
    return delta


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"targets": ALL_TARGETS},
    "rslora": {"targets": ALL_TARGETS, "use_rslora": True},
    "mixed ranks": {
        "targets": ALL_TARGETS,
        "rank_pattern": {"q_proj": 8, r".*\.1\.mlp\.up_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "one layer": {"targets": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "all linear": {"targets": "all-linear", "exclude_modules": ["o_proj"]},
    "half precision": {"targets": ALL_TARGETS, "rank": 3, "alpha": 5, "dtype": torch.float16},
    "bfloat16": {"targets": ALL_TARGETS, "rank": 3, "alpha": 5, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_deltas_equal_pefts(
    options: dict[str, Any], model: LlamaForCausalLM, geometry: BaseGeometry, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path, model, **options)
    expected = {
        path.removeprefix("base_model.model."): delta_weight(module)
        for path, module in load_with_peft(model, {"default": folder}).named_modules()
        if isinstance(module, LoraLayer)
    }
    factors = read(folder, geometry)
    assert factors.keys() == expected.keys()
    for path, delta in expected.items():
        factor = factors[path]
        assert factor.a is not None
        assert factor.b is not None
        assert factor.a.dtype == factor.b.dtype == torch.float32
        assert factor.a.shape[0] == factor.b.shape[1] == factor.rank
        torch.testing.assert_close(factor.b @ factor.a, delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", TINY_MODELS)
def test_every_family_reads_its_own_adapter(family: str, tmp_path: Path) -> None:
    model = TINY_MODELS[family]()
    geometry = BaseGeometry.of(model, model_id=family)
    factors = read(make_adapter(tmp_path, model, targets="all-linear"), geometry)
    assert factors.keys() == geometry.linears.keys()


def test_the_adapters_name_in_the_keys_is_accepted(adapter: Path, geometry: BaseGeometry) -> None:
    before = read(adapter, geometry)
    edit_tensors(
        adapter, lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()}
    )
    after = read(adapter, geometry)
    assert before.keys() == after.keys()
    for path, term in before.items():
        torch.testing.assert_close((term.a, term.b), (after[path].a, after[path].b), rtol=0, atol=0)


def spoil(name: str) -> Any:
    changes: dict[str, Any] = {
        "missing A": lambda t: t.pop(Q_A),
        "missing B": lambda t: t.pop(Q_B),
        "NaN": lambda t: t[Q_B][0].fill_(float("nan")),
        "inf": lambda t: t[Q_A][0].fill_(float("inf")),
        "overflow": lambda t: t[Q_B].fill_(3e38),
        "integers": lambda t: t.update({Q_A: t[Q_A].to(torch.int32)}),
        "twice": lambda t: t.update({Q_A.replace(".weight", ".default.weight"): t[Q_A].clone()}),
        "rank": lambda t: t.update({Q_A: torch.zeros(3, 64)}),
        "in": lambda t: t.update({Q_A: torch.zeros(4, 63)}),
        "out": lambda t: t.update({Q_B: torch.zeros(65, 4)}),
        "swapped": lambda t: t.update({Q_A: torch.zeros(64, 4)}),
        "flat": lambda t: t.update({Q_A: torch.zeros(256)}),
        "other layer": lambda t: t.update({Q_A.replace("s.0.", "s.9."): torch.zeros(4, 64)}),
        "suffix": lambda t: t.update({Q_A.replace("weight", "scale"): torch.zeros(1)}),
        "no prefix": lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()},
        "dora": lambda t: t.update(
            {Q_A.replace("lora_A.weight", "lora_magnitude_vector"): torch.zeros(64)}
        ),
        "bias": lambda t: t.update({Q_B.replace("weight", "bias"): torch.zeros(64)}),
        "norm": lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(64)}),
    }
    return changes[name]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("missing A", InvalidAdapter, f"the tensor '{Q_A}' is missing"),
        ("missing B", InvalidAdapter, f"the tensor '{Q_B}' is missing"),
        ("NaN", InvalidAdapter, f"'{Q_B}' holds NaN or infinite"),
        ("inf", InvalidAdapter, f"'{Q_A}' holds NaN or infinite"),
        ("overflow", InvalidAdapter, f"'{Q_B}' holds NaN or infinite"),
        ("integers", InvalidAdapter, "has dtype I32; F64, F32, F16, BF16 are read"),
        ("twice", InvalidAdapter, "are the same factor"),
        ("rank", InvalidAdapter, r"has shape \[3, 64\]; \[4, 64\] is needed: .* rank 4"),
        ("in", IncompatibleAdapter, r"has shape \[4, 63\]; \[4, 64\] is needed: the base"),
        ("out", IncompatibleAdapter, r"has shape \[65, 4\]; \[64, 4\] is needed: the base"),
        ("swapped", IncompatibleAdapter, r"has shape \[64, 4\]; \[4, 64\] is needed"),
        ("flat", IncompatibleAdapter, r"has shape \[256\]; \[4, 64\] is needed"),
        ("other layer", InvalidAdapter, "a module that target_modules does not match"),
        ("suffix", InvalidAdapter, r"lora_A\.scale' is no LoRA factor"),
        ("no prefix", InvalidAdapter, "is no LoRA factor"),
        ("dora", InvalidAdapter, "is a DoRA magnitude, which the config's use_dora does not ask"),
        ("bias", InvalidAdapter, "is a LoRA bias, which the config's lora_bias does not ask for"),
        ("norm", InvalidAdapter, "replaces 'model.norm.weight' of the base model, which neither"),
    ],
)
def test_wrong_tensors_are_refused_by_name(
    change: str, error: type[Exception], message: str, adapter: Path, geometry: BaseGeometry
) -> None:
    edit_tensors(adapter, spoil(change))
    with pytest.raises(error, match=message) as caught:
        read(adapter, geometry)
    assert caught.type is error


def test_a_config_of_fewer_targets_is_refused(adapter: Path, geometry: BaseGeometry) -> None:
    edit_config(adapter, target_modules=["q_proj"])
    with pytest.raises(InvalidAdapter, match="target_modules does not match"):
        read(adapter, geometry)


def test_another_base_is_told_both_shapes(adapter: Path) -> None:
    wide = BaseGeometry.of(TINY_MODELS["llama"](intermediate_size=128), model_id="wide")
    with pytest.raises(IncompatibleAdapter, match=r"\[96, 4\]; \[128, 4\] is needed"):
        read(adapter, wide)


def test_a_shape_that_does_not_fit_its_bytes_is_refused(
    adapter: Path, geometry: BaseGeometry
) -> None:
    path = adapter / WEIGHTS_FILE
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"shape":[4,64]', b'"shape":[4,65]', 1))
    with pytest.raises(InvalidAdapter, match="is not a whole safetensors file"):
        read(adapter, geometry)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(keep: float, adapter: Path, geometry: BaseGeometry) -> None:
    path = adapter / WEIGHTS_FILE
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InvalidAdapter, match="is not a whole safetensors file"):
        read(adapter, geometry)


def test_a_missing_file_is_refused(adapter: Path, geometry: BaseGeometry) -> None:
    (adapter / WEIGHTS_FILE).unlink()
    with pytest.raises(InvalidAdapter, match=r"adapter_model\.safetensors is missing"):
        read(adapter, geometry)


def test_the_digest_is_of_the_content_not_of_the_file(adapter: Path, tmp_path: Path) -> None:
    twin = copy_adapter(adapter, tmp_path / "twin")
    edit_config(twin, base_model_name_or_path="another/spelling", peft_version="0")
    tensors = load_file(twin / WEIGHTS_FILE)
    save_file(dict(reversed(tensors.items())), twin / WEIGHTS_FILE, {"made by": "a test"})
    assert (twin / WEIGHTS_FILE).read_bytes() != (adapter / WEIGHTS_FILE).read_bytes()
    assert digest(twin) == digest(adapter)
    assert len(digest(twin)) == 64


def test_whatever_changes_the_answers_changes_the_digest(adapter: Path, tmp_path: Path) -> None:
    def twin(name: str) -> Path:
        return copy_adapter(adapter, tmp_path / name)

    alpha, value, dtype = twin("alpha"), twin("value"), twin("dtype")
    edit_config(alpha, lora_alpha=9)
    edit_tensors(value, lambda t: t[Q_B][0, 0].add_(1))
    edit_tensors(dtype, lambda t: {k: v.half() for k, v in t.items()})
    found = [digest(folder) for folder in (adapter, alpha, value, dtype)]
    found += [digest(adapter, {}), digest(adapter, {"description": "x"})]
    assert len(set(found)) == len(found)
