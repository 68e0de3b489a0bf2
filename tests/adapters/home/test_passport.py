from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from dynamic_lora_adapters import BaseGeometry, LoraSpec, Passport, TaskCard, read_adapter
from dynamic_lora_adapters.files.chat import ChatFormat
from dynamic_lora_adapters.files.json_file import read_json_object
from dynamic_lora_adapters.home.passport import CHECKS, find_features, write_passport
from dynamic_lora_adapters.terms import (
    AdapterTerms,
    EmbeddingTerms,
    LinearTerms,
    ModuleOverride,
    PromptTerms,
)
from tests.support.adapters import make_adapter

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def passport_of(folder: Path, geometry: BaseGeometry) -> Passport:
    spec = LoraSpec.parse(read_json_object(folder / "adapter_config.json"))
    return write_passport(
        name="ner",
        version="0" * 64,
        created_at=NOW,
        folder=folder,
        kind=spec.kind,
        base_model=spec.base_model,
        terms=read_adapter(folder, spec, geometry),
        self_check=1.25e-7,
        dtype="float32",
        card=TaskCard(description="d"),
        chat=ChatFormat(template="x", end_tokens=("</s>",), end_ids=(1,)),
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
        "chat_template": True,
        "end_tokens": ["</s>", 1],
        "features": [],
        "self_check": 1.25e-7,
        "notes": ["n"],
        "ignored_files": ["README.md"],
    }
    assert passport.model_dump(include=set(expected)) == expected
    assert passport.checks[:-1] == list(CHECKS)
    assert (
        "in float32 differ from those in double precision by at most 1.2e-07" in passport.checks[-1]
    )
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


def test_every_feature_has_its_name() -> None:
    ones = torch.ones(2)
    whole = AdapterTerms(
        linears={"x": LinearTerms(scale=ones, dense=torch.ones(2, 2), bias=ones)},
        embeddings={"y": EmbeddingTerms()},
        overrides={"z": ModuleOverride(parameters={"weight": ones})},
        prompt=PromptTerms(num_tokens=1),
        invocation_ids=(1,),
    )
    names = ["bias", "scale", "dense", "embedding", "override", "prompt", "invocation"]
    assert find_features(whole) == names
    assert find_features(AdapterTerms()) == []


def test_an_adapter_without_factors_has_rank_0(model: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path, model)
    passport = write_passport(
        name="ner",
        version="0" * 64,
        created_at=NOW,
        folder=folder,
        kind="ia3",
        base_model=None,
        terms=AdapterTerms(
            linears={"model.layers.0.mlp.up_proj": LinearTerms(bias=torch.ones(96))}
        ),
        self_check=0.0,
        dtype="bfloat16",
        card=None,
        chat=None,
        notes=[],
        ignored_files=[],
    )
    assert (passport.rank, passport.scaling, passport.num_modules) == (0, 0.0, 1)
    assert passport.target_modules == ["up_proj"]
    assert (passport.chat_template, passport.end_tokens) == (False, [])
