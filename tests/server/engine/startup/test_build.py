"""Options of an engine that the model decides about."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dynamic_lora_adapters.apply import costs
from dynamic_lora_adapters.apply.costs import KernelCosts
from dynamic_lora_adapters.apply.products import ProductKind
from dynamic_lora_adapters.kernels import KERNELS
from dynamic_lora_adapters.native.product import NativeProduct
from dynamic_lora_adapters.terms import AdapterTerms, LinearTerms
from dynamic_lora_server.engine.decoder.native_decoder import adopt_native_layers
from dynamic_lora_server.engine.engine import FailedEvent
from dynamic_lora_server.engine.startup import build as building
from dynamic_lora_server.engine.startup import product_kind
from dynamic_lora_server.engine.startup.build import EngineOptions, build_engine
from dynamic_lora_server.engine.startup.costs import StartupCosts
from dynamic_lora_server.engine.startup.mode_costs import settled_mode
from dynamic_lora_server.errors import InvalidParameter, UnsupportedModel
from dynamic_lora_server.modes import Mode, StepCosts
from tests.support.engines import make_engine, make_sequence, random_prompt, run_all
from tests.support.models import tiny_llama

CUDA = torch.device("cuda")
NO_STEPS = StepCosts.never_merging()


def build(said: list[str], **options: Any) -> None:
    build_engine(
        tiny_llama(),
        model_id="tiny",
        options=EngineOptions(kv_memory=2**22, adapter_memory=2**22, **options),
        on_step=said.append,
    )


def test_a_product_that_cannot_be_had_is_refused_by_name() -> None:
    model: Any = tiny_llama()
    with pytest.raises(
        InvalidParameter, match=r"base_product = native .*weights are torch\.bfloat16"
    ):
        make_engine(model.to(torch.bfloat16), base_product=ProductKind.NATIVE)


def test_weights_stay_plain_where_memory_for_the_copies_is_not_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(product_kind, "free_memory", lambda _: 1000)
    build(said)
    assert "Laying out the weights (plain products)" in said
    build(said, base_product=ProductKind.PACKED)
    assert "Laying out the weights (packed products)" in said


def test_weights_that_are_not_on_a_cpu_stay_plain_and_nothing_runs_in_cpp(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    built = make_engine(tiny_llama(), native=False)
    runner = built.engine.runner
    torch.nn.Module.to(runner.model, torch.device("meta"))
    monkeypatch.setattr(product_kind, "free_memory", lambda _: 1000)
    kind = building._product_kind(runner.model, built.groups, EngineOptions())
    assert kind is ProductKind.PLAIN
    decoder = adopt_native_layers(runner.model, runner.site, [], runner.cache)
    assert decoder.attention is None
    assert not caplog.records


def test_a_kv_dtype_that_cannot_be_had_is_refused_before_the_weights_are_packed() -> None:
    said: list[str] = []
    with pytest.raises(InvalidParameter, match="kv_dtype = float16 cannot be had here"):
        build(said, kv_dtype=torch.float16)
    assert said == ["Checking the model"]


def test_pages_hold_every_running_sequence_at_its_longest() -> None:
    """A window that ends within a page takes all of that page."""
    window = 300
    model = tiny_llama(max_position_embeddings=window)
    assert make_engine(model, paged=True, max_running=1).context_length == window
    model = tiny_llama(max_position_embeddings=window)
    built = make_engine(model, paged=True, max_running=3)
    for seed in range(3):
        built.engine.add(make_sequence(random_prompt(290, seed=seed)))
    built.engine.step()
    assert built.engine.scheduler.num_running == 3


def test_without_native_code_nothing_of_it_is_used() -> None:
    built = make_engine(tiny_llama(), native=False)
    runner = built.engine.runner
    assert runner.decoder.attention is None
    assert not runner.decoder.num_layers
    layer: Any = runner.model.get_submodule("model.layers.0.mlp.up_proj")
    assert not isinstance(layer._projection.base, NativeProduct)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_gpu_adapters_are_merged_only_if_that_is_asked_for(device: str) -> None:
    settled = {mode: settled_mode(mode, torch.device(device), copied=0) for mode in Mode}
    auto = Mode.BYPASS if device == "cuda" else Mode.AUTO
    assert settled == {Mode.AUTO: auto, Mode.BYPASS: Mode.BYPASS, Mode.MERGED: Mode.MERGED}


def test_memory_that_weights_kept_short_will_take_is_not_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dynamic_lora_server.engine.startup.mode_costs.free_memory", lambda _: 99)
    cpu = torch.device("cpu")
    assert settled_mode(Mode.AUTO, cpu, copied=40) is Mode.AUTO
    assert settled_mode(Mode.AUTO, cpu, copied=40, widened=20) is Mode.BYPASS


def test_where_memory_is_short_adapters_are_merged_only_if_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dynamic_lora_server.engine.startup.mode_costs.free_memory", lambda _: 99)
    plain, packed = ProductKind.PLAIN, ProductKind.PACKED
    modes = make_engine(tiny_llama(), base_product=plain).modes
    assert modes.stats().mode is Mode.BYPASS
    assert "Adapters are not merged: a copy of the weights takes" in caplog.text
    modes = make_engine(tiny_llama(), base_product=plain, mode=Mode.MERGED).modes
    assert modes.stats().mode is Mode.MERGED
    modes = make_engine(tiny_llama(), base_product=packed).modes
    assert modes.stats().mode is Mode.AUTO


def test_a_start_with_memory_again_measures_the_switch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"base_product": ProductKind.PLAIN, "costs_file": tmp_path / "costs.json"}
    with monkeypatch.context() as patched:
        patched.setattr("dynamic_lora_server.engine.startup.mode_costs.free_memory", lambda _: 99)
        said: list[str] = []
        build(said, **options)
    assert "Measuring steps and switches" not in said
    for expected in (True, False):
        said = []
        build(said, **options)
        assert ("Measuring steps and switches" in said) == expected


def test_the_mode_that_is_settled_for_the_device_is_the_engine_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def on_cuda(mode: Mode, _device: torch.device, *, copied: int, widened: int) -> Mode:
        return settled_mode(mode, CUDA, copied=copied, widened=widened)

    monkeypatch.setattr(building, "settled_mode", on_cuda)
    said: list[str] = []
    build(said, mode=Mode.AUTO)
    assert "Measuring the delta kernels" in said
    assert "Measuring steps and switches" not in said
    assert make_engine(tiny_llama(), mode=Mode.AUTO).modes.stats().mode is Mode.BYPASS


def test_kernels_are_compiled_at_starts_that_measure_nothing_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[list[tuple[int, int]]] = []

    def noting(kernels: Any, shapes: list[tuple[int, int]], *_: object) -> Any:
        compiled.append(shapes)
        return kernels

    monkeypatch.setattr(costs, "compiled_ahead", noting)
    file = tmp_path / "costs.json"
    file.with_stem("costs-plain").write_text(
        StartupCosts(KernelCosts(dict.fromkeys(KERNELS, {(1, 1): 1.0})), NO_STEPS).to_json()
    )
    said: list[str] = []
    build(said, mode=Mode.BYPASS, native=False, costs_file=file, base_product=ProductKind.PLAIN)
    assert "Measuring the delta kernels" not in said
    ((first, *_),) = compiled
    assert first[0] == 64


def test_a_quantised_base_is_refused_by_name() -> None:
    model = tiny_llama()
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    weight = torch.zeros(1, dtype=torch.int8)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(UnsupportedModel, match=r"LlamaForCausalLM is quantised.*cannot be merged"):
        make_engine(model)


@pytest.mark.parametrize("native", [False, True])
def test_logits_that_are_no_numbers_end_their_sequence_alone(native: bool) -> None:
    """Upload refuses such adapters; whatever else may bring them about gets no token."""
    built = make_engine(tiny_llama(), native=native)
    huge = LinearTerms(a=torch.full((4, 64), 1e30), b=torch.full((64, 4), 1e30))
    path = "model.layers.0.self_attn.o_proj"
    adapter = built.pool.admit("huge", AdapterTerms(linears={path: huge}))
    broken = make_sequence([5, 6, 7], adapter=adapter)
    built.engine.add(broken)
    (event,) = built.engine.step()
    assert event == FailedEvent(broken.id, "its logits are no finite numbers")
    assert not built.engine.has_work
    (tokens,) = run_all(built, [make_sequence([5, 6, 7])])
    (expected,) = run_all(make_engine(tiny_llama(), native=native), [make_sequence([5, 6, 7])])
    assert tokens == expected
