from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from dynamic_lora_adapters import BaseGeometry, LoraSpec, Passport, TaskCard, read_adapter
from dynamic_lora_adapters.json_file import read_json_object
from dynamic_lora_adapters.passport import write_passport
from tests.support.adapters import make_adapter

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def passport_of(folder: Path, geometry: BaseGeometry) -> Passport:
    spec = LoraSpec.parse(read_json_object(folder / "adapter_config.json"))
    return write_passport(
        name="ner",
        version="0" * 64,
        created_at=NOW,
        folder=folder,
        spec=spec,
        factors=read_adapter(folder, spec, geometry),
        card=TaskCard(description="d"),
        notes=["n"],
        ignored_files=["README.md"],
    )


def test_a_uniform_adapter(model: LlamaForCausalLM, geometry: BaseGeometry, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path, model, rank=4, alpha=8, base_model="org/Tiny-Llama")
    passport = passport_of(folder, geometry)
    expected: dict[str, Any] = {
        "kind": "lora",
        "rank": 4,
        "ranks": None,
        "scaling": 2.0,
        "scalings": None,
        "target_modules": ["q_proj", "v_proj"],
        "num_modules": 4,
        # Two layers of q (64 -> 64) and v (64 -> 32).
        "num_parameters": 2 * 4 * ((64 + 64) + (64 + 32)),
        "bytes": (folder / "adapter_model.safetensors").stat().st_size,
        "dtype": "float32",
        "base_model": "org/Tiny-Llama",
        "notes": ["n"],
        "ignored_files": ["README.md"],
    }
    assert passport.model_dump(include=set(expected)) == expected
    assert passport.checks
    assert Passport.model_validate_json(passport.model_dump_json()) == passport


@pytest.mark.parametrize("use_rslora", [False, True])
def test_mixed_ranks_are_listed(
    use_rslora: bool, model: LlamaForCausalLM, geometry: BaseGeometry, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path, model, rank_pattern={"q_proj": 16}, use_rslora=use_rslora)
    passport = passport_of(folder, geometry)
    assert (passport.rank, passport.ranks) == (16, [4, 16])
    scalings = [2.0, 4.0] if use_rslora else [0.5, 2.0]
    assert (passport.scaling, passport.scalings) == (scalings[-1], scalings)
    assert passport.kind == ("rslora" if use_rslora else "lora")
