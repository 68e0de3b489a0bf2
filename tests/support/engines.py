"""Engines around tiny models, and the tokens that PEFT generates on the same model."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from dynamic_lora_adapters.device.slab import ResidentAdapter
from dynamic_lora_adapters.lora.spec import LoraSpec
from dynamic_lora_adapters.lora.weights import read_adapter
from dynamic_lora_adapters.terms import AdapterTerms
from dynamic_lora_server.engine import sequence
from dynamic_lora_server.engine.engine import FailedEvent
from dynamic_lora_server.engine.model_runner import ModelRunner
from dynamic_lora_server.engine.scheduler import Piece, Scheduler
from dynamic_lora_server.engine.startup.build import BuiltEngine, EngineOptions, build_engine
from dynamic_lora_server.generation import FinishReason, SamplingParams
from tests.support.adapters import ALL_TARGETS

NUM_TOKENS = 10
# Tasks of a mixed batch; None is the base model.
TASKS = ["attention", "all", None, "rslora", "down", "large", None, "one layer", "pattern", "all"]

_ids = itertools.count()


def make_engine(model: PreTrainedModel, **options: Any) -> BuiltEngine:
    """An engine around `model` (which is edited) with little memory and small pieces."""
    defaults: dict[str, Any] = {
        "kv_memory": 2**22,
        "adapter_memory": 2**26,
        "prefill_chunk": 32,
        "max_running": 16,
    }
    return build_engine(model, model_id="tiny", options=EngineOptions(**defaults | options))


def read_terms(built: BuiltEngine, folder: Path) -> AdapterTerms:
    """Read a PEFT folder against the engine's base."""
    spec = LoraSpec.parse(json.loads((folder / "adapter_config.json").read_text()))
    return read_adapter(folder, spec, built.geometry, built.weights)


def admit(built: BuiltEngine, folder: Path) -> ResidentAdapter:
    """Bring a PEFT folder to the engine's device."""
    adapter = built.pool.admit(folder.name, read_terms(built, folder))
    assert adapter is not None
    return adapter


def make_sequence(
    prompt_ids: Sequence[int],
    *,
    adapter: ResidentAdapter | None = None,
    seed: int = 0,
    **params: Any,
) -> sequence.Sequence:
    """A continuation of ten tokens (end of sequence ignored) unless `params` say otherwise."""
    sampling = SamplingParams(**{"max_new_tokens": 10, "ignore_eos": True} | params)
    return sequence.Sequence(
        id=next(_ids),
        prompt_ids=tuple(prompt_ids),
        sampling=sampling,
        stop_ids=frozenset({1}),
        seed=seed,
        adapter=adapter,
    )


def advance(scheduler: Scheduler, piece: Piece, *token_ids: int) -> FinishReason | None:
    """A piece is started and has run at once, with these tokens if it samples."""
    scheduler.begin(piece)
    return scheduler.settle(piece, token_ids)[1]


def run_all(built: BuiltEngine, sequences: Sequence[sequence.Sequence]) -> list[list[int]]:
    """Run the sequences together to their ends; their output ids."""
    for one in sequences:
        built.engine.add(one)
    while built.engine.has_work:
        for event in built.engine.step():
            assert not isinstance(event, FailedEvent), event
    built.engine.scheduler.check_integrity()
    return [one.output_ids for one in sequences]


def recorded_logits(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """A list that gets the logits [num_sampled, vocab] of every packed step from now on."""
    found: list[torch.Tensor] = []
    run = ModelRunner.run

    def recording(self: ModelRunner, *args: Any, **options: Any) -> Any:
        options.pop("greedy_only", None)  # there would be none
        pieces, logits = run(self, *args, **options)
        found.append(logits.clone())
        return pieces, logits

    monkeypatch.setattr(ModelRunner, "run", recording)
    return found


def random_prompt(length: int, *, seed: int) -> list[int]:
    """Random token ids of the tiny tokenizer's vocabulary, special ones left out."""
    generator = torch.Generator().manual_seed(seed)
    return [int(i) for i in torch.randint(3, 300, (length,), generator=generator)]


@torch.inference_mode()
def peft_greedy(
    model: PeftModel, adapter: str | None, prompt_ids: Sequence[int], num_tokens: int
) -> list[int]:
    """Greedy tokens by PEFT, one full forward pass a token: the oracle."""
    ids = list(prompt_ids)
    if adapter is not None:
        model.set_adapter(adapter)
    for _ in range(num_tokens):
        if adapter is None:
            with model.disable_adapter():
                logits = model(input_ids=torch.tensor([ids])).logits
        else:
            logits = model(input_ids=torch.tensor([ids])).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt_ids) :]


ADAPTER_KINDS: Mapping[str, Mapping[str, Any]] = {
    "attention": {"rank": 4, "targets": ["q_proj", "v_proj"], "seed": 1},
    "all": {"rank": 8, "targets": "all-linear", "seed": 2},
    "rslora": {"rank": 8, "targets": "all-linear", "use_rslora": True, "seed": 3},
    "down": {"rank": 3, "alpha": 16, "targets": ["down_proj", "o_proj"], "seed": 4},
    "large": {"rank": 24, "targets": ["gate_proj", "k_proj"], "seed": 5},
    "one layer": {"rank": 2, "targets": ALL_TARGETS, "layers_to_transform": [1], "seed": 6},
    "pattern": {
        "rank": 4,
        "targets": "all-linear",
        "rank_pattern": {"q_proj": 6},
        "alpha_pattern": {"down_proj": 32},
        "seed": 7,
    },
}
"""Arguments of `make_adapter` that together cover ranks, targets and scalings."""


def expected_tokens(oracle: PeftModel, task: str | None, prompt: list[int]) -> list[int]:
    """PEFT's greedy tokens for a task of `ADAPTER_KINDS`, or for the base model."""
    return peft_greedy(oracle, task and task.replace(" ", "_"), prompt, NUM_TOKENS)
