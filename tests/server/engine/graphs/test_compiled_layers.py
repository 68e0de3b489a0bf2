"""Decoder layers that torch compiles: the same tokens, or no engine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch._dynamo.utils import counters

from dynamic_lora_server.engine.startup.build import BuiltEngine
from dynamic_lora_server.errors import InvalidParameter, UnsupportedModel
from dynamic_lora_server.modes import Mode
from tests.support.engines import (
    admit,
    expected_tokens,
    make_engine,
    make_sequence,
    random_prompt,
    run_all,
)
from tests.support.models import TINY_MODELS, tiny_llama
from tests.support.triton import interpreted

pytestmark = [
    pytest.mark.skipif(
        not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler"
    ),
    # torch's own compiler warns of what torch uses.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """Nothing is compiled yet, and nothing counted."""
    torch._dynamo.reset()
    counters.clear()


def compiled(model: Any, **options: Any) -> BuiltEngine:
    """As on a GPU with --compile, but for the capture."""
    return make_engine(
        model, paged=True, decode_graphs=True, compile_layers=True, native=False, **options
    )


def test_rows_with_adapters_get_the_tokens_of_peft(
    oracle: PeftModel, folders: dict[str, Path]
) -> None:
    with interpreted():
        built = compiled(tiny_llama(), mode=Mode.BYPASS)
        tasks = ["all", None, "down"]
        prompts = [random_prompt(3 + 9 * i, seed=i) for i in range(len(tasks))]
        sequences = [
            make_sequence(
                prompt,
                adapter=None if task is None else admit(built, folders[task]),
                max_new_tokens=3,
            )
            for task, prompt in zip(tasks, prompts, strict=True)
        ]
        tokens = run_all(built, sequences)
    for task, prompt, actual in zip(tasks, prompts, tokens, strict=True):
        assert actual == expected_tokens(oracle, task, prompt)[:3], task


@pytest.mark.parametrize("num_layers", [2, 6])
def test_nothing_is_compiled_after_the_start(num_layers: int) -> None:
    """One code for a single row and one for all other numbers, whatever the number of layers."""
    built = compiled(tiny_llama(num_hidden_layers=num_layers))
    plain = make_engine(tiny_llama(num_hidden_layers=num_layers), paged=True, native=False)
    num_codes = counters["stats"]["unique_graphs"]
    for num_rows in (1, 2, 4, 5, 8, 16):
        waves = [
            [make_sequence(random_prompt(5, seed=n), max_new_tokens=3) for n in range(num_rows)]
            for _ in range(2)
        ]
        assert run_all(built, waves[0]) == run_all(plain, waves[1])
    assert counters["stats"]["unique_graphs"] == num_codes
    # A layer is cut into ten pieces by its projections and its attention.
    assert 10 < num_codes <= 20


def test_compiled_code_is_kept_where_other_results_are(tmp_path: Path) -> None:
    """In a process of its own: torch settles its default when it is imported."""
    code = (
        "import os, transformers\n"
        "from dynamic_lora_server.engine.graphs.compiled_layers import CompiledLayers\n"
        "from tests.support.models import tiny_llama\n"
        "CompiledLayers(tiny_llama())\n"
        "print(os.environ['TORCHINDUCTOR_CACHE_DIR'])\n"
    )
    variable = "TORCHINDUCTOR_CACHE_DIR"
    others = {name: value for name, value in os.environ.items() if name != variable}
    for given, expected in [
        ({}, str(tmp_path / "dynamic-lora" / "torch")),
        ({variable: "/somewhere/else"}, "/somewhere/else"),
    ]:
        environment = others | {"XDG_CACHE_HOME": str(tmp_path)} | given
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        assert ran.stdout.strip() == expected


def test_prompts_run_through_the_models_own_layers() -> None:
    built = compiled(tiny_llama())
    before = counters["frames"]["total"]
    built.engine.add(make_sequence(random_prompt(20, seed=0)))
    built.engine.step()
    assert counters["frames"]["total"] == before > 0
    layer = built.engine.runner.model.get_submodule("model.layers.0")
    assert "forward" not in vars(layer)


def test_without_steps_of_fixed_shape_it_is_refused() -> None:
    message = "compile is for decoding in CUDA graphs, and there are none: "
    for options, obstacle in [
        ({}, "there is no CUDA device"),
        ({"decode_graphs": False}, "they are switched off"),
        ({"decode_graphs": True, "paged": False}, "the KV cache has no pages"),
    ]:
        with pytest.raises(InvalidParameter, match=message + obstacle) as caught:
            make_engine(tiny_llama(), compile_layers=True, **options)
        assert caught.value.field == "compile"


def test_layers_that_compute_something_else_are_refused() -> None:
    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if torch.compiler.is_compiling() else x

    model = tiny_llama()
    model.get_submodule("model.layers.1.mlp").act_fn = Wrong()
    with pytest.raises(UnsupportedModel, match="the logits of 1 rows are others") as caught:
        compiled(model)
    assert caught.value.fix == "Start without --compile."


def test_layers_that_cannot_be_compiled_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("no room for the code\nin many lines")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", failing)
    message = "LlamaForCausalLM cannot decode with compiled layers: .*no room for the code"
    with pytest.raises(UnsupportedModel, match=message):
        compiled(tiny_llama())


def test_a_model_that_has_no_static_step_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="soft-capped logits and attention sinks have no"):
        compiled(TINY_MODELS["gemma2"]())
