"""Base models whose checkpoints are not what their configs say."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynamic_lora_server.base.base_model import BaseModelUnavailable
from dynamic_lora_server.base.loading import WrongWeights, read_model
from tests.support.models import TINY_MODELS, save_tiny_base
from tests.support.runtimes import load_runtime

NORM = "model.norm.weight"


def change(base: Path, file: str, **tensors: torch.Tensor | None) -> None:
    """Put other tensors into a file of weights; None takes one out."""
    found = load_file(base / file)
    for name, tensor in tensors.items():
        found.pop(name)
        if tensor is not None:
            found[name] = tensor
    save_file(found, base / file, metadata={"format": "pt"})


def sharded(folder: Path) -> tuple[Path, str]:
    """A tiny base in several files, and the name of the one that has the last norm."""
    TINY_MODELS["llama"]().save_pretrained(folder, max_shard_size="50KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return folder, index["weight_map"][NORM]


def test_a_base_that_lacks_weights_is_not_served(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "torn")
    change(base, "model.safetensors", **{NORM: None, "lm_head.weight": None})
    with pytest.raises(BaseModelUnavailable) as caught:
        load_runtime(tmp_path, model=str(base))
    assert caught.value.message == (
        f"{base} cannot be loaded: it lacks weights: lm_head.weight (expected in "
        f"model.safetensors), {NORM} (expected in model.safetensors)"
    )


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "other")
    change(base, "model.safetensors", **{NORM: torch.ones(65)})
    with pytest.raises(BaseModelUnavailable) as caught:
        load_runtime(tmp_path, model=str(base))
    assert f"{NORM} is [65] in place of [64] (in model.safetensors)" in caught.value.message


def test_a_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "cut")
    with (base / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(BaseModelUnavailable, match="cut cannot be loaded: "):
        load_runtime(tmp_path, model=str(base))


def test_of_several_files_the_one_that_was_to_have_it_is_named(tmp_path: Path) -> None:
    base, file = sharded(tmp_path)
    read_model(base, torch.float32)
    change(base, file, **{NORM: None})
    with pytest.raises(WrongWeights, match=rf"model\.norm\.weight \(expected in {file}\)$"):
        read_model(base, torch.float32)


def test_nor_may_the_index_leave_one_out(tmp_path: Path) -> None:
    base, file = sharded(tmp_path)
    change(base, file, **{NORM: None})
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    del index["weight_map"][NORM]
    path.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(WrongWeights, match=rf"\(expected in {path.name}\)$"):
        read_model(base, torch.float32)


def test_of_many_some_are_named_and_the_others_counted(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path)
    found = load_file(base / "model.safetensors")
    change(base, "model.safetensors", **dict.fromkeys(list(found)[1:]))
    with pytest.raises(WrongWeights, match=f", and {len(found) - 9} more$"):
        read_model(base, torch.float32)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_a_head_that_is_tied_is_not_missing(tmp_path: Path, family: str) -> None:
    made = TINY_MODELS[family](tie_word_embeddings=True)
    made.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    read = read_model(tmp_path, torch.float32)
    head, embedding = read.get_output_embeddings(), read.get_input_embeddings()
    assert head is not None and head.weight is embedding.weight
    torch.testing.assert_close(head.weight, made.get_input_embeddings().weight, rtol=0, atol=0)
