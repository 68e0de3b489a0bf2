import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from dynamic_lora_adapters.apply.products import ProductKind, obstacle
from dynamic_lora_adapters.errors import AdapterError
from dynamic_lora_adapters.home.store import BlobStore
from dynamic_lora_server.base import dtypes
from dynamic_lora_server.base.base_model import BaseModelUnavailable
from dynamic_lora_server.base.dtypes import choose_dtype
from dynamic_lora_server.engine.drafting.drafts import MAX_DRAFT
from dynamic_lora_server.errors import InvalidParameter, UnsupportedModel
from dynamic_lora_server.runtime import Runtime, Tier, num_drafted, shipped_adapters
from tests.support.adapters import make_adapter
from tests.support.models import (
    VOCAB_SIZE,
    save_tiny_base,
    tiny_bloom,
    tiny_falcon,
    tiny_llama,
    tiny_tokenizer,
)
from tests.support.runtimes import (
    collect,
    load_runtime,
    publish,
    serving,
    spec,
    tiny_config,
    token_ids,
)


async def test_adapters_survive_a_restart(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", tiny_llama())
    async with serving(tmp_path) as runtime:
        digest = publish(runtime, "a", folder)
        before = await collect(runtime, spec(adapter="a"))
        assert runtime.tier(digest) is Tier.DEVICE
    async with serving(tmp_path) as runtime:
        assert runtime.tier(digest) is Tier.DISK
        assert await collect(runtime, spec(adapter="a")) == before
        assert runtime.tier(digest) is Tier.DEVICE


async def test_a_server_that_has_adapters_imports_what_reading_them_takes_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imports: list[str] = []
    monkeypatch.setattr("dynamic_lora_server.runtime.import_peft", lambda: imports.append("peft"))
    async with serving(tmp_path) as runtime:
        publish(runtime, "a", make_adapter(tmp_path / "a", tiny_llama()))
    assert not imports
    load_runtime(tmp_path).registry.close()
    assert imports == ["peft"]


async def test_a_token_that_the_model_has_no_row_for_is_refused(tmp_path: Path) -> None:
    """Such as padding that was added to the tokenizer alone; others are served on."""
    save_tiny_base(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra-{index}>" for index in range(VOCAB_SIZE + 1 - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path / "base")
    async with serving(tmp_path) as runtime:
        for prompt in (f"<extra-{VOCAB_SIZE - len(tiny_tokenizer())}>", (VOCAB_SIZE,)):
            with pytest.raises(InvalidParameter, match=f"outside 0 to {VOCAB_SIZE - 1}"):
                await collect(runtime, spec(prompt))
        assert token_ids(await collect(runtime, spec((VOCAB_SIZE - 1,))))


def test_shipped_adapters_of_another_base_are_skipped(tmp_path: Path) -> None:
    runtime = Runtime.load(tiny_config(tmp_path), shipped=shipped_adapters())
    assert list(runtime.registry.list()) == []
    runtime.registry.close()


@pytest.mark.parametrize(
    ("make", "name"), [(tiny_falcon, "FalconForCausalLM"), (tiny_bloom, "BloomForCausalLM")]
)
def test_a_model_that_cannot_be_served_is_refused_by_name(
    make: Callable[[], PreTrainedModel], name: str, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(UnsupportedModel, match=rf"{name} .*AttentionInterface"):
        load_runtime(tmp_path, model=str(tmp_path / "other"))


def test_compiled_layers_without_a_gpu_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="and there are none: there is no CUDA device"):
        load_runtime(tmp_path, compile=True)


def test_a_kv_cache_too_small_for_a_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="kv_memory of 100 bytes holds 0 tokens of 512"):
        load_runtime(tmp_path, kv_memory=100)


@pytest.mark.parametrize(("kv_dtype", "found"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_keys_and_values_are_kept_in_the_dtype_that_is_asked_for(
    tmp_path: Path, kv_dtype: str, found: str
) -> None:
    runtime = load_runtime(tmp_path, kv_dtype=kv_dtype)
    assert runtime.built.engine.runner.cache.keys[0].dtype == getattr(torch, found)
    runtime.registry.close()


def test_a_kv_dtype_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="kv_dtype = float16 cannot be had here"):
        load_runtime(tmp_path, kv_dtype="float16")


@pytest.mark.parametrize("memory", [100, 2**22])
def test_a_prefix_cache_that_is_nothing_or_everything_is_refused(
    tmp_path: Path, memory: int
) -> None:
    with pytest.raises(InvalidParameter, match=f"prefix_cache_memory of {memory} bytes is .* 16 "):
        load_runtime(tmp_path, prefix_cache_memory=memory)


@pytest.mark.usefixtures("measuring")
def test_costs_are_measured_once_for_each_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamic_lora_adapters.apply.costs.MAX_SECONDS", 1000.0)
    load_runtime(tmp_path, base_product="plain").registry.close()
    (costs,) = (tmp_path / "home" / "costs").iterdir()
    monkeypatch.setattr("dynamic_lora_server.engine.startup.costs.measure_costs", None)
    load_runtime(tmp_path, base_product="plain").registry.close()
    monkeypatch.undo()
    costs.write_text("[]")
    monkeypatch.setattr("dynamic_lora_adapters.apply.costs.MAX_SECONDS", 1000.0)
    load_runtime(tmp_path, base_product="plain").registry.close()
    assert costs.read_text() != "[]"
    shutil.rmtree(tmp_path / "home")


def test_costs_of_one_kind_of_products_are_not_anothers(tmp_path: Path) -> None:
    """Also where no option names the kind: what is free in memory decides, too."""
    load_runtime(tmp_path, base_product="plain").registry.close()
    (costs,) = (tmp_path / "home" / "costs").iterdir()
    assert costs.stem.endswith("-plain")


@pytest.mark.usefixtures("measuring")
def test_costs_of_a_busy_machine_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamic_lora_adapters.apply.costs.MAX_SECONDS", 0.0)
    load_runtime(tmp_path).registry.close()
    assert not (tmp_path / "home" / "costs").exists()


def test_costs_that_cannot_be_kept_are_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "costs").touch()  # no folder can be made there
    load_runtime(tmp_path).registry.close()
    assert "is not kept for the next start" in caplog.text


def test_a_home_that_is_in_use_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "home")
    with pytest.raises(AdapterError, match="Another server is using"):
        load_runtime(tmp_path, model="nowhere/at-all")
    store.close()


def test_a_base_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "bare")
    with pytest.raises(BaseModelUnavailable, match="bare cannot be loaded: ") as caught:
        load_runtime(tmp_path, model=str(tmp_path / "bare"))
    assert "and a tokenizer" in (caught.value.fix or "")


def test_a_base_that_needs_what_is_not_installed_is_named(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "awq")
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    settings["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (base / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(BaseModelUnavailable, match="awq cannot be loaded: "):
        load_runtime(tmp_path, model=str(base))


def test_a_start_that_fails_gives_the_home_back(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseModelUnavailable):
        load_runtime(tmp_path, model=str(tmp_path / "empty"))
    BlobStore(tmp_path / "home").close()


def test_in_a_container_no_more_threads_compute_than_its_share_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = torch.get_num_threads()
    monkeypatch.setattr("dynamic_lora_server.runtime.within_quota", lambda _: number + 1)
    try:
        load_runtime(tmp_path, threads=None).registry.close()
        assert torch.get_num_threads() == number + 1
        load_runtime(tmp_path, threads=1).registry.close()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(number)


def test_dtype_by_name_and_by_measurement() -> None:
    config, cpu = tiny_llama().config, torch.device("cpu")
    assert choose_dtype("bfloat16", cpu, config) is torch.bfloat16
    assert choose_dtype("auto", cpu, config) in (torch.float32, torch.bfloat16)
    config.dtype = torch.float32
    assert choose_dtype("auto", torch.device("cuda"), config) is torch.bfloat16
    config.dtype = torch.float16
    assert choose_dtype("auto", torch.device("cuda"), config) is torch.float16


@pytest.mark.parametrize(
    ("short", "expected"), [(0.9, torch.float32), (0.5, torch.float32), (0.3, torch.bfloat16)]
)
def test_without_cpp_bfloat16_must_be_clearly_faster_on_a_cpu(
    short: float, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtypes, "_seconds", lambda *_: [1.0, short])
    config, cpu = tiny_llama().config, torch.device("cpu")
    assert choose_dtype("auto", cpu, config, native=False) is expected


@pytest.mark.skipif(obstacle(ProductKind.NATIVE, torch.zeros(1, 1)) is not None, reason="no C++")
def test_with_cpp_a_cpu_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "_seconds", lambda *_: [1.0, 0.1])
    assert choose_dtype("auto", torch.device("cpu"), tiny_llama().config) is torch.float32


async def test_a_cpu_drafts_unless_told_not_to(tmp_path: Path) -> None:
    """Answers are the same; the second is the first again, which has been said before."""
    answers = []
    for changes in ({}, {"speculate": 0}):
        async with serving(tmp_path, **changes) as runtime:
            assert (runtime.built.engine.scheduler.drafter is None) == bool(changes)
            answers += [await collect(runtime, spec(max_new_tokens=32)) for _ in range(2)]
    assert all(token_ids(answer) == token_ids(answers[0]) for answer in answers)


def test_a_gpu_drafts_nothing_by_itself(tmp_path: Path) -> None:
    assert num_drafted(tiny_config(tmp_path), torch.device("cuda")) == 0
    assert num_drafted(tiny_config(tmp_path), torch.device("cpu")) == MAX_DRAFT
    assert num_drafted(tiny_config(tmp_path, speculate=3), torch.device("cuda")) == 3
