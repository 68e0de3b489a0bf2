"""In bfloat16 the engine is as near to PEFT as PEFT's own two ways are to each other."""

from pathlib import Path

import pytest
import torch

from dynamic_lora_adapters.apply.products import ProductKind
from dynamic_lora_server.engine.startup.build import BuiltEngine
from dynamic_lora_server.modes import Mode
from tests.support.adapters import load_with_peft, make_adapter
from tests.support.engines import admit, make_engine, make_sequence, random_prompt
from tests.support.models import tiny_llama

PROMPTS = [random_prompt(24, seed=seed) for seed in range(8)]


def half(model: torch.nn.Module) -> None:
    model.to(torch.bfloat16)


def engine_logits(built: BuiltEngine, folder: Path) -> torch.Tensor:
    """Logits [prompts, vocab] after each prompt, in the order of the prompts."""
    adapter = admit(built, folder)
    sequences = [make_sequence(prompt, adapter=adapter) for prompt in PROMPTS]
    for sequence in sequences:
        built.engine.add(sequence)
    pieces = built.engine.scheduler.schedule()
    built.engine.modes.before_step(pieces, built.engine.scheduler.num_by_adapter)
    sampled, logits = built.engine.runner.run(pieces)
    order = [sampled.index(piece) for piece in pieces]
    return logits[order].clone()


@torch.inference_mode()
def peft_logits(folder: Path, *, merged: bool) -> torch.Tensor:
    base = tiny_llama()
    half(base)
    model = load_with_peft(base, {"a": folder})
    if merged:
        model.merge_adapter(["a"])
    rows = [model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]
    return torch.stack(rows).float()


@pytest.mark.parametrize("mode", [Mode.BYPASS, Mode.MERGED])
def test_bounded_by_what_peft_differs_from_itself(mode: Mode, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", tiny_llama(), rank=8, targets="all-linear")
    unmerged, merged = peft_logits(folder, merged=False), peft_logits(folder, merged=True)
    bound = float((unmerged - merged).abs().max())
    base = tiny_llama()
    half(base)
    built = make_engine(base, mode=mode, prefill_chunk=512, base_product=ProductKind.PLAIN)
    actual = engine_logits(built, folder)
    nearest = min(float((actual - oracle).abs().max()) for oracle in (unmerged, merged))
    assert bound > 0
    assert nearest <= bound
    if mode is Mode.MERGED:
        assert built.modes.stats().num_merged_rows > 0
