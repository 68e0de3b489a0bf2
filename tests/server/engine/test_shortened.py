"""Adapters saved in sixteen bits are kept so beside a model in float32, and give PEFT's tokens."""

from pathlib import Path

import pytest
import torch

from dynamic_lora_adapters.apply.products import ProductKind, obstacle
from dynamic_lora_server.modes import Mode
from tests.support.adapters import load_with_peft, make_adapter
from tests.support.engines import (
    NUM_TOKENS,
    admit,
    make_engine,
    make_sequence,
    peft_greedy,
    random_prompt,
    run_all,
)
from tests.support.models import TINY_MODELS

REASON = obstacle(ProductKind.NATIVE, torch.ones(8, 8))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("mode", [Mode.BYPASS, Mode.MERGED])
@pytest.mark.parametrize("family", ["llama", "gemma2"])  # layers in C++, and transformers' own
def test_beside_others_in_one_batch(family: str, mode: Mode, tmp_path: Path) -> None:
    make_model = TINY_MODELS[family]
    folders = {
        name: make_adapter(
            tmp_path / name, make_model(), rank=4, targets="all-linear", dtype=dtype, seed=number
        )
        for number, (name, dtype) in enumerate(DTYPES.items())
    }
    oracle = load_with_peft(make_model(), folders)
    built = make_engine(make_model(), base_product=ProductKind.NATIVE, mode=mode)
    adapters = {name: admit(built, folder) for name, folder in folders.items()}
    for name, adapter in adapters.items():
        tables = [table for table in adapter.slab.a if table is not None]
        assert tables and all(table.dtype == DTYPES[name] for table in tables)

    names: list[str | None] = ["bf16", "fp32", None, "fp16", "bf16", "fp16"]
    prompts = [random_prompt(length, seed=length) for length in (40, 5, 9, 3, 17, 33)]
    tokens = run_all(
        built,
        [
            make_sequence(prompt, adapter=None if owner is None else adapters[owner])
            for owner, prompt in zip(names, prompts, strict=True)
        ],
    )
    for owner, prompt, actual in zip(names, prompts, tokens, strict=True):
        assert actual == peft_greedy(oracle, owner, prompt, NUM_TOKENS), owner


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scaling_that_leaves_sixteen_bits_leaves_float32(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Scaling is folded into b: by 8/4 it stays short, by 8/5 it does not."""
    make_model = TINY_MODELS["llama"]
    built = make_engine(make_model(), base_product=ProductKind.NATIVE)
    for rank, kept_in in ((4, dtype), (5, torch.float32)):
        folder = make_adapter(tmp_path / str(rank), make_model(), rank=rank, alpha=8, dtype=dtype)
        assert admit(built, folder).slab.factor_dtype == kept_in
