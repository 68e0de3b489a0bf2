"""The engine's greedy tokens are those of PEFT on the same model, alone and mixed."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel

from dynamic_lora_adapters.apply.costs import KernelChooser
from dynamic_lora_adapters.apply.products import ProductKind, obstacle
from dynamic_lora_adapters.kernels import DeltaKernel, kernels_for
from dynamic_lora_adapters.kernels.native_segments import NativeSegments
from dynamic_lora_adapters.segments import Run
from dynamic_lora_server.engine.startup.build import BuiltEngine
from tests.support.adapters import load_with_peft, make_adapter, save_adapter
from tests.support.costs import fixed_costs
from tests.support.engines import (
    ADAPTER_KINDS,
    NUM_TOKENS,
    TASKS,
    admit,
    expected_tokens,
    make_engine,
    make_sequence,
    peft_greedy,
    random_prompt,
    run_all,
)
from tests.support.models import TINY_MODELS, tiny_llama

PRODUCTS = {"packed": ProductKind.PACKED, "native": ProductKind.NATIVE}


@pytest.fixture(scope="module", params=["contiguous", "paged", "packed", "native"])
def built(request: pytest.FixtureRequest) -> BuiltEngine:
    kind = PRODUCTS.get(request.param, ProductKind.PLAIN)
    if (reason := obstacle(kind, torch.ones(8, 8))) is not None:
        pytest.skip(reason)
    native = kind is ProductKind.NATIVE
    return make_engine(
        tiny_llama(), paged=request.param == "paged", base_product=kind, native=native
    )


@pytest.mark.parametrize("task", [*ADAPTER_KINDS, None])
def test_alone(
    built: BuiltEngine, oracle: PeftModel, folders: dict[str, Path], task: str | None
) -> None:
    prompt = random_prompt(40, seed=9)
    adapter = None if task is None else admit(built, folders[task])
    (tokens,) = run_all(built, [make_sequence(prompt, adapter=adapter)])
    assert tokens == expected_tokens(oracle, task, prompt)


def check_mixed(built: BuiltEngine, oracle: PeftModel, folders: dict[str, Path]) -> None:
    """Many tasks in one batch, each with the tokens that PEFT gives it."""
    prompts = [random_prompt(3 + 9 * i, seed=i) for i in range(len(TASKS))]
    sequences = [
        make_sequence(prompt, adapter=None if task is None else admit(built, folders[task]))
        for task, prompt in zip(TASKS, prompts, strict=True)
    ]
    tokens = run_all(built, sequences)
    for task, prompt, actual in zip(TASKS, prompts, tokens, strict=True):
        assert actual == expected_tokens(oracle, task, prompt), task


def test_mixed(built: BuiltEngine, oracle: PeftModel, folders: dict[str, Path]) -> None:
    check_mixed(built, oracle, folders)


@pytest.mark.parametrize("name", kernels_for(torch.device("cpu"), torch.float32))
def test_mixed_with_every_delta_kernel(
    name: str, oracle: PeftModel, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the kernel is measured to be the fastest."""
    with fixed_costs(cheapest=name):
        native = name == NativeSegments.name
        built = make_engine(tiny_llama(), base_product=ProductKind.PLAIN, native=native)
    chosen = set()
    choose = KernelChooser.choose

    def recording(self: KernelChooser, run: Run) -> DeltaKernel:
        kernel = choose(self, run)
        chosen.add(kernel.name)
        return kernel

    monkeypatch.setattr(KernelChooser, "choose", recording)
    check_mixed(built, oracle, folders)
    assert chosen == {name}


def test_late_comers_join_a_running_batch(
    built: BuiltEngine, oracle: PeftModel, folders: dict[str, Path]
) -> None:
    first, second = random_prompt(20, seed=1), random_prompt(50, seed=2)
    early = make_sequence(first, adapter=admit(built, folders["all"]))
    built.engine.add(early)
    for _ in range(4):
        built.engine.step()
    assert early.output_ids
    late = make_sequence(second, adapter=admit(built, folders["down"]))
    run_all(built, [late])
    assert early.output_ids == expected_tokens(oracle, "all", first)
    assert late.output_ids == expected_tokens(oracle, "down", second)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3", "olmo2"])
def test_replaced_norms(family: str, tmp_path: Path) -> None:
    """All of a model's, among them those of the heads, behind a transpose or before it."""
    model = TINY_MODELS[family]()
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["v_proj"], modules_to_save=["norm"]
    )
    folders = {
        name: save_adapter(tmp_path / name, model, config, seed=seed)
        for seed, name in enumerate(["one", "two"])
    }
    oracle = load_with_peft(model, folders)
    built = make_engine(TINY_MODELS[family]())
    for tasks in (["one"], ["one", None, "two", "one", None]):
        prompts = [random_prompt(7 + 13 * i, seed=i) for i in range(len(tasks))]
        sequences = [
            make_sequence(prompt, adapter=None if task is None else admit(built, folders[task]))
            for task, prompt in zip(tasks, prompts, strict=True)
        ]
        tokens = run_all(built, sequences)
        for task, prompt, actual in zip(tasks, prompts, tokens, strict=True):
            assert actual == peft_greedy(oracle, task, prompt, NUM_TOKENS), (tasks, task)


@pytest.mark.parametrize("family", sorted(set(TINY_MODELS) - {"gpt2"}))
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_architectures(family: str, paged: bool, tmp_path: Path) -> None:
    """Beyond the sliding windows of 32 tokens where the architecture has them."""
    build = TINY_MODELS[family]
    folder = make_adapter(tmp_path / "a", build(), rank=4, targets="all-linear")
    oracle = load_with_peft(build(), {"a": folder})
    built = make_engine(build(), paged=paged, base_product=ProductKind.PLAIN, native=False)
    prompts = [random_prompt(length, seed=length) for length in (60, 11, 45)]
    tasks = ["a", None, "a"]
    adapter = admit(built, folder)
    tokens = run_all(
        built,
        [
            make_sequence(prompt, adapter=adapter if task else None)
            for task, prompt in zip(tasks, prompts, strict=True)
        ],
    )
    for task, prompt, actual in zip(tasks, prompts, tokens, strict=True):
        assert actual == peft_greedy(oracle, task, prompt, NUM_TOKENS)
