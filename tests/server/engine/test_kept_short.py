"""Checkpoints in sixteen bits whose weights stay in their files, beside a model in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from dynamic_lora_adapters.apply.pristine import Restore
from dynamic_lora_adapters.apply.products import EXACT_KINDS, ProductKind, obstacle
from dynamic_lora_adapters.apply.widening import (
    WideningEmbedding,
    WideningLinear,
    may_widen,
    model_dtype,
    widen,
)
from dynamic_lora_adapters.geometry import BaseGeometry
from dynamic_lora_server.base.base_model import BaseModel
from dynamic_lora_server.base.loading import load_model, read_model
from dynamic_lora_server.engine.startup import product_kind
from dynamic_lora_server.engine.startup.build import BuiltEngine
from dynamic_lora_server.modes import Mode
from tests.support.adapters import load_with_peft, save_adapter
from tests.support.engines import (
    TASKS,
    admit,
    expected_tokens,
    make_engine,
    make_sequence,
    random_prompt,
    recorded_logits,
    run_all,
)
from tests.support.models import TINY_MODELS, TINY_MOE_MODELS, tiny_llama, tiny_tokenizer
from tests.support.runtimes import tiny_config

MAPS = Path("/proc/self/maps")
WEIGHTS = "model.safetensors"
SHORT = [torch.bfloat16, torch.float16]
LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3", "granite", *TINY_MOE_MODELS}
PROMPTS = [random_prompt(3 + 9 * i, seed=i) for i in range(len(TASKS))]


def save_short(
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    model: PreTrainedModel | None = None,
    shard_size: str = "1GB",
) -> Path:
    """A tiny base whose weights are saved in sixteen bits."""
    model = tiny_llama() if model is None else model
    model.to(dtype)  # type: ignore[arg-type]
    model.save_pretrained(folder, max_shard_size=shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, dtype: str = "float32", **changes: object) -> PreTrainedModel:
    """The model of a folder as the server loads it."""
    base = BaseModel(name="tiny", path=folder, origin="a test")
    config = tiny_config(folder, model=str(folder), dtype=dtype, **changes)
    return load_model(base, config, torch.device("cpu"))[0]


def widened(model: PreTrainedModel) -> set[str]:
    """The paths of the modules that keep their weights short."""
    kinds = WideningLinear | WideningEmbedding
    return {path for path, module in model.named_modules() if isinstance(module, kinds)}


def mapped_file(tensor: torch.Tensor) -> str | None:
    """The name of the file that a tensor is a mapped part of."""
    for line in MAPS.read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            path = line.split(maxsplit=5)[5:]
            return Path(path[0]).name if path else None
    return None


def run_tasks(built: BuiltEngine, folders: dict[str, Path]) -> list[list[int]]:
    """Ten tokens for each of TASKS, all in one batch."""
    sequences = [
        make_sequence(prompt, adapter=None if task is None else admit(built, folders[task]))
        for task, prompt in zip(TASKS, PROMPTS, strict=True)
    ]
    return run_all(built, sequences)


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_a_widened_model_gives_the_logits_of_one_in_float32(dtype: torch.dtype, tied: bool) -> None:
    model, ids = tiny_llama(tie_word_embeddings=tied), torch.arange(3, 40)[None]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    whole = tiny_llama(tie_word_embeddings=tied)
    whole.load_state_dict(model.state_dict())
    paths = [path for path, module in model.named_modules() if may_widen(module)]
    assert len(paths) == 2 * 7 + 2
    widen(model, paths, torch.float32)
    assert torch.equal(model(ids).logits, whole(ids).logits)
    assert model_dtype(model) is torch.float32
    assert model.get_parameter("model.layers.1.mlp.down_proj.weight").dtype is dtype


@pytest.mark.parametrize("mode", [Mode.BYPASS, Mode.MERGED])
@pytest.mark.parametrize("kind", ProductKind)
def test_every_logit_is_that_of_weights_in_float32(
    kind: ProductKind,
    mode: Mode,
    tmp_path: Path,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if (reason := obstacle(kind, torch.ones(8, 8))) is not None:
        pytest.skip(reason)
    base = save_short(tmp_path)
    logits = recorded_logits(monkeypatch)
    for model in (load(base), read_model(base, torch.float32)):
        built = make_engine(model, base_product=kind, mode=mode)
        logits.clear()
        run_tasks(built, folders)
        found = list(logits)
        if mode is Mode.MERGED:
            assert built.modes.stats().num_merged_rows > 0
        if model_dtype(model) is not model.dtype:
            short = found
    assert len(short) == len(found) > 0
    assert all(map(torch.equal, short, found))


@pytest.mark.parametrize("restore", Restore)
@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_tokens_are_those_of_peft(
    kind: ProductKind, restore: Restore, tmp_path: Path, folders: dict[str, Path]
) -> None:
    if (reason := obstacle(kind, torch.ones(8, 8))) is not None:
        pytest.skip(reason)
    base = save_short(tmp_path)
    named = {name.replace(" ", "_"): folder for name, folder in folders.items()}
    oracle: PeftModel = load_with_peft(read_model(base, torch.float32), named)
    options = {"base_product": kind, "mode": Mode.MERGED, "restore": restore, "checkpoint": base}
    model = load(base)
    assert "lm_head" in widened(model)
    built = make_engine(model, **options)
    tokens = run_tasks(built, folders)
    assert built.modes.stats().num_merged_rows > 0
    for task, prompt, actual in zip(TASKS, PROMPTS, tokens, strict=True):
        assert actual == expected_tokens(oracle, task, prompt), task


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "keys",
    [
        {"use_dora": True, "target_modules": "all-linear"},
        {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 42]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["DoRA", "DoRA of the embedding", "tokens", "embedding"],
)
def test_adapters_are_read_against_the_widened_weights(
    keys: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    base = save_short(tmp_path / "base", model=tiny_llama(tie_word_embeddings=tied))
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **keys)
    folder = save_adapter(tmp_path / "own", read_model(base, torch.float32), config)
    model = load(base)
    assert "lm_head" in widened(model)
    built = make_engine(model)
    resident = admit(built, folder)
    tokens = run_all(built, [make_sequence(prompt, adapter=resident) for prompt in PROMPTS])
    oracle = load_with_peft(read_model(base, torch.float32), {"own": folder})
    assert tokens == [expected_tokens(oracle, "own", prompt) for prompt in PROMPTS]


def test_users_read_of_the_modules_that_these_stand_for(tmp_path: Path) -> None:
    model = load(save_short(tmp_path))
    assert "lm_head" in widened(model)
    shown, whole = (BaseGeometry.of(m, model_id="x") for m in (model, tiny_llama()))
    assert shown.modules == whole.modules


@pytest.mark.skipif(not MAPS.exists(), reason="what is mapped cannot be read here")
@pytest.mark.parametrize("dtype", [*SHORT, torch.float32], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_beside_packed_weights_the_files_are_mapped(
    dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    if (reason := obstacle(ProductKind.PACKED, torch.ones(8, 8))) is not None:
        pytest.skip(reason)
    model = load(save_short(tmp_path, dtype, tiny_llama(tie_word_embeddings=tied)))
    make_engine(model, base_product=ProductKind.PACKED, mode=Mode.MERGED)
    tables = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    assert {mapped_file(table) for table in tables.values()} == {WEIGHTS}
    assert all(table.dtype is dtype for table in tables.values())


@pytest.mark.skipif(not MAPS.exists(), reason="what is mapped cannot be read here")
def test_so_they_are_where_there_are_several(tmp_path: Path) -> None:
    model = load(save_short(tmp_path, shard_size="50KB"))
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert len(files) > 1
    assert {mapped_file(model.get_parameter(f"{path}.weight")) for path in widened(model)} == files


def test_one_weight_in_other_bits_has_all_read_in_float32(tmp_path: Path) -> None:
    base = save_short(tmp_path)
    assert "lm_head" in widened(load(base))
    found = load_file(base / WEIGHTS)
    found["model.norm.weight"] = found["model.norm.weight"].float()
    save_file(found, base / WEIGHTS, metadata={"format": "pt"})
    model = load(base)
    assert not widened(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", sorted(TINY_MODELS | TINY_MOE_MODELS))
@torch.inference_mode()
def test_of_each_architecture_the_logits_are_float32s(family: str, tmp_path: Path) -> None:
    """Of those that round something else when they are made in sixteen bits, nothing stays short.

    Gemma's scale of the embedding is one.
    """
    base, ids = (
        save_short(tmp_path, model=(TINY_MODELS | TINY_MOE_MODELS)[family]()),
        torch.arange(3, 40)[None],
    )
    model = load(base)
    assert torch.equal(model(ids).logits, read_model(base, torch.float32)(ids).logits)
    assert model.config.dtype is torch.float32
    assert bool(widened(model)) is (family in LLAMA_LIKE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_that_computes_in_sixteen_bits_has_nothing_to_widen(
    dtype: str, tmp_path: Path
) -> None:
    model = load(save_short(tmp_path), dtype)
    assert not widened(model)
    assert str(model_dtype(model)) == f"torch.{dtype}"


def test_a_bounded_embedding_is_none_that_may_stay_short() -> None:
    assert may_widen(torch.nn.Embedding(4, 4))
    assert not may_widen(torch.nn.Embedding(4, 4, max_norm=1.0))


def test_where_memory_is_short_plain_products_would_take_no_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if (reason := obstacle(ProductKind.PACKED, torch.ones(8, 8))) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(product_kind, "free_memory", lambda _: 2**10)
    # Which of those that may be taken is the fastest is measured.
    monkeypatch.setattr(product_kind, "fastest_kind", lambda _, kinds, **__: kinds[-1])
    groups = make_engine(tiny_llama(), base_product=ProductKind.PLAIN).groups
    for model, packed in ((load(save_short(tmp_path)), True), (tiny_llama(), False)):
        caplog.clear()
        found = product_kind.product_kind(model, groups, None, native=True, in_place=False)
        assert (found is not ProductKind.PLAIN) is packed
        short = "Memory is short: weights take 0 MiB of 0 MiB in float32; --quantize int8 takes a"
        assert (short if packed else "Weights are not packed") in caplog.text
