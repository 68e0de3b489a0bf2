"""The base brought back by subtracting: what is served meanwhile, and what comes back."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dynamic_lora_adapters.apply.pristine import Restore, SubtractedWeights
from dynamic_lora_server.engine.startup.build import BuiltEngine
from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.modes import Mode
from tests.support.engines import (
    admit,
    expected_tokens,
    make_engine,
    make_sequence,
    random_prompt,
    run_all,
)
from tests.support.models import tiny_llama

PROMPT = random_prompt(20, seed=1)


@pytest.fixture(params=["5GB", "100KB"], ids=["one file", "an index of several"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny_llama().save_pretrained(folder, max_shard_size=request.param)
    assert (folder / "model.safetensors.index.json").exists() is (request.param == "100KB")
    return folder


def subtracting(checkpoint: Path | None) -> BuiltEngine:
    return make_engine(
        tiny_llama(), mode=Mode.MERGED, restore=Restore.SUBTRACT, checkpoint=checkpoint
    )


def delete(built: BuiltEngine, folder: Path) -> None:
    """The next step unmerges an adapter that nobody uses any more."""
    adapter = admit(built, folder)
    while adapter.num_leases:
        built.pool.release(adapter)
    built.pool.drop(adapter.digest)


def test_merged_adapters_and_the_base_after_them(
    checkpoint: Path, oracle: PeftModel, folders: dict[str, Path]
) -> None:
    built = subtracting(checkpoint)
    for task in ("all", "down", "all"):
        adapter = admit(built, folders[task])
        merged, base = run_all(
            built, [make_sequence(PROMPT, adapter=adapter), make_sequence(PROMPT)]
        )
        assert built.modes.stats().merged == adapter.digest
        assert merged == expected_tokens(oracle, task, PROMPT), task
        assert base == expected_tokens(oracle, None, PROMPT), task
    delete(built, folders["all"])
    (base,) = run_all(built, [make_sequence(PROMPT)])
    assert built.modes.stats().merged is None
    assert built.modes.stats().num_switches == 4
    assert base == expected_tokens(oracle, None, PROMPT)


def test_weights_that_drifted_are_read_from_the_checkpoint(
    checkpoint: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SubtractedWeights, "MAX_DRIFT", -1.0)  # however little it is
    built = subtracting(checkpoint)
    run_all(built, [make_sequence(PROMPT, adapter=admit(built, folders["all"]))])
    held, plain = built.engine.runner.model, tiny_llama()
    changed = [n for n, p in plain.named_parameters() if not torch.equal(p, held.get_parameter(n))]
    assert len(changed) == 2 * 7  # every linear layer of both
    delete(built, folders["all"])
    run_all(built, [make_sequence(PROMPT)])
    for name, parameter in plain.named_parameters():
        assert torch.equal(held.get_parameter(name), parameter), name


def test_adapters_are_read_against_the_checkpoint_meanwhile(
    checkpoint: Path, folders: dict[str, Path]
) -> None:
    built = subtracting(checkpoint)
    run_all(built, [make_sequence(PROMPT, adapter=admit(built, folders["all"]))])
    for name, parameter in tiny_llama().named_parameters():
        assert torch.equal(built.weights.parameter(name), parameter), name


@pytest.mark.parametrize("missing", ["folder", "weight"])
def test_a_checkpoint_that_lacks_a_weight_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    checkpoint = None
    name = "model.layers.0.self_attn.q_proj.weight"
    if missing == "weight":
        tiny_llama().save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors[name]
        save_file(tensors, tmp_path / "model.safetensors")
        checkpoint = tmp_path
    with pytest.raises(InvalidParameter, match=f"restore = subtract .* which has no '{name}'"):
        subtracting(checkpoint)
