"""Keys and values that are kept in fewer bits than the model's: where, and what it changes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dynamic_lora_adapters.apply.products import ProductKind, obstacle
from dynamic_lora_adapters.geometry import LayerGeometry
from dynamic_lora_server.engine.kv.cache import KVCache
from dynamic_lora_server.engine.startup.build import BuiltEngine
from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.modes import Mode
from tests.support.engines import (
    admit,
    make_engine,
    make_sequence,
    random_prompt,
    recorded_logits,
    run_all,
)
from tests.support.models import tiny_llama

REASON = obstacle(ProductKind.NATIVE, torch.ones(8, 8))
needs_cpp = pytest.mark.skipif(REASON is not None, reason=str(REASON))

# Of the largest logit: what keys and values with eight bits of mantissa may make.
ROUNDING = 2e-2


def kv_dtype(built: BuiltEngine) -> torch.dtype:
    cache = built.engine.runner.cache
    (dtype,) = {table.dtype for table in (*cache.keys, *cache.values)}
    return dtype


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"kv_dtype": torch.bfloat16}, torch.bfloat16),
        ({"kv_dtype": torch.bfloat16, "native": False}, torch.bfloat16),
        pytest.param({"base_product": ProductKind.BF16}, torch.bfloat16, marks=needs_cpp),
        pytest.param({"base_product": ProductKind.INT8}, torch.bfloat16, marks=needs_cpp),
        pytest.param({"base_product": ProductKind.W8A8}, torch.bfloat16, marks=needs_cpp),
        pytest.param(
            {"base_product": ProductKind.BF16, "kv_dtype": torch.float32},
            torch.float32,
            marks=needs_cpp,
        ),
        pytest.param(
            {"base_product": ProductKind.BF16, "paged": True}, torch.float32, marks=needs_cpp
        ),
    ],
    ids=str,
)
def test_what_is_kept_in_which_dtype(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert kv_dtype(make_engine(tiny_llama(), mode=Mode.BYPASS, **options)) == dtype


def test_half_the_bytes_hold_twice_the_tokens() -> None:
    whole = make_engine(tiny_llama(), kv_memory=2**16)
    half = make_engine(tiny_llama(), kv_memory=2**16, kv_dtype=torch.bfloat16)
    assert half.context_length == 2 * whole.context_length


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"kv_dtype": torch.float16}, "float16"),
        ({"kv_dtype": torch.bfloat16, "paged": True}, "bfloat16"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(
        InvalidParameter, match=f"kv_dtype = {wanted} cannot be had here.*dtype, float32, or"
    ) as refused:
        make_engine(tiny_llama(), **options)
    assert refused.value.field == "kv_dtype"


def test_more_bits_than_the_models_are_refused() -> None:
    model: Any = tiny_llama()
    with pytest.raises(InvalidParameter, match=r"kv_dtype = float32 .*dtype, bfloat16, or"):
        make_engine(model.to(torch.bfloat16), kv_dtype=torch.float32)


def test_what_is_written_is_rounded_to_the_nearest() -> None:
    cache = KVCache(
        [LayerGeometry(2, 16, 16)], num_cells=4, device=torch.device("cpu"), dtype=torch.bfloat16
    )
    new = torch.randn(3, 2, 16)
    cache.write(0, torch.tensor([2, 0, 3]), new, -new)
    assert torch.equal(cache.keys[0][[2, 0, 3]], new.bfloat16())
    assert torch.equal(cache.values[0][[2, 0, 3]], -new.bfloat16())


def logits_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, layers: bool = True, **options: Any
) -> torch.Tensor:
    """The logits behind three prompts."""
    built = make_engine(tiny_llama(), mode=Mode.BYPASS, **options)
    if not layers:
        built.engine.runner.decoder.give_back()
    assert bool(built.engine.runner.decoder.num_layers) is (layers and "native" not in options)
    found = recorded_logits(monkeypatch)
    prompt = random_prompt(80, seed=4)
    # Pieces of 32: each reads what the one before has written, the last of the first two with
    # one token, as decoding does.
    sequences = [
        make_sequence(prompt[:65], adapter=admit(built, folder), max_new_tokens=1),
        make_sequence(prompt[:33], max_new_tokens=1),
        make_sequence(prompt[5:], adapter=admit(built, folder), max_new_tokens=1),
    ]
    run_all(built, sequences)
    monkeypatch.undo()
    return torch.cat(found)


@needs_cpp
@pytest.mark.parametrize("layers", [True, False], ids=["layers in C++", "attention in C++"])
def test_logits_differ_by_the_rounding_alone(
    layers: bool, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    native: dict[str, Any] = {"base_product": ProductKind.NATIVE}
    whole = logits_of(folders["all"], monkeypatch, **native)
    half = logits_of(folders["all"], monkeypatch, layers=layers, kv_dtype=torch.bfloat16, **native)
    error = (half - whole).abs().max() / whole.abs().max()
    assert 0 < error < ROUNDING


def test_logits_differ_by_the_rounding_alone_without_cpp(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = logits_of(folders["all"], monkeypatch, native=False)
    half = logits_of(folders["all"], monkeypatch, native=False, kv_dtype=torch.bfloat16)
    error = (half - whole).abs().max() / whole.abs().max()
    assert 0 < error < ROUNDING


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_cpp), False])
def test_a_request_in_a_batch_and_one_that_finds_its_prefix_answer_as_alone(
    native: bool, folders: dict[str, Path]
) -> None:
    prompts = [random_prompt(length, seed=length) for length in (50, 7, 21)]
    alone = make_engine(tiny_llama(), native=native, kv_dtype=torch.bfloat16, prefix_cache_memory=0)
    adapter = admit(alone, folders["all"])
    expected = [run_all(alone, [make_sequence(p, adapter=adapter)])[0] for p in prompts]
    built = make_engine(tiny_llama(), native=native, kv_dtype=torch.bfloat16)
    adapter = admit(built, folders["all"])
    for _ in range(2):
        sequences = [make_sequence(prompt, adapter=adapter) for prompt in prompts]
        assert run_all(built, sequences) == expected
    assert sequences[0].num_cached_prompt >= 32
