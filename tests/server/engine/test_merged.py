"""Merged mode in the engine: the same tokens as PEFT, for everybody in the batch."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from dynamic_lora_adapters.apply import merge
from dynamic_lora_adapters.apply.products import EXACT_KINDS, ProductKind, obstacle
from dynamic_lora_adapters.compositions.compose import compose
from dynamic_lora_adapters.device.groups import GroupTerms
from dynamic_lora_adapters.terms import AdapterTerms, ModuleOverride
from dynamic_lora_server.engine import mode_controller
from dynamic_lora_server.engine.mode_controller import ModeController
from dynamic_lora_server.engine.startup.build import BuiltEngine
from dynamic_lora_server.modes import Mode, StepCosts
from tests.support.engines import (
    TASKS,
    admit,
    expected_tokens,
    make_engine,
    make_sequence,
    random_prompt,
    read_terms,
    run_all,
)
from tests.support.models import tiny_llama

PARTS = {"all": 0.7, "large": -0.5, "down": 0.4}


@pytest.fixture(params=EXACT_KINDS)
def built(request: pytest.FixtureRequest) -> BuiltEngine:
    if (reason := obstacle(request.param, torch.ones(8, 8))) is not None:
        pytest.skip(reason)
    built = make_engine(tiny_llama(), base_product=request.param, mode=Mode.MERGED)
    in_layers = request.param is ProductKind.NATIVE
    assert bool(built.engine.runner.decoder.num_layers) is in_layers
    return built


def test_everybody_in_a_batch_with_a_merged_adapter(
    built: BuiltEngine, oracle: PeftModel, folders: dict[str, Path]
) -> None:
    prompts = [random_prompt(3 + 9 * i, seed=i) for i in range(len(TASKS))]
    sequences = [
        make_sequence(prompt, adapter=None if task is None else admit(built, folders[task]))
        for task, prompt in zip(TASKS, prompts, strict=True)
    ]
    tokens = run_all(built, sequences)
    for task, prompt, actual in zip(TASKS, prompts, tokens, strict=True):
        assert actual == expected_tokens(oracle, task, prompt), task
    stats = built.modes.stats()
    # The adapter of most requests is merged at once, and only it.
    assert stats.num_switches >= 1
    assert stats.num_merged_rows > 0
    assert stats.num_bypass_rows > 0
    assert stats.num_base_rows > 0


def test_rows_carry_over_a_switch_in_mid_decode(
    built: BuiltEngine, oracle: PeftModel, folders: dict[str, Path]
) -> None:
    """Alone, then outnumbered, then alone again: the weights change under the first row."""
    prompt = random_prompt(20, seed=1)
    early = make_sequence(prompt, adapter=admit(built, folders["all"]))
    built.engine.add(early)
    for _ in range(3):
        built.engine.step()
    assert built.modes.stats().merged == early.adapter_digest
    late = [make_sequence(prompt, adapter=admit(built, folders["down"])) for _ in range(3)]
    base = make_sequence(prompt)
    run_all(built, [*late, base])
    assert built.modes.stats().num_switches >= 2
    assert early.output_ids == expected_tokens(oracle, "all", prompt)
    assert base.output_ids == expected_tokens(oracle, None, prompt)
    for sequence in late:
        assert sequence.output_ids == expected_tokens(oracle, "down", prompt)


def test_a_deleted_adapter_leaves_the_weights(built: BuiltEngine, folders: dict[str, Path]) -> None:
    adapter = admit(built, folders["all"])
    prompt = random_prompt(8, seed=1)
    run_all(built, [make_sequence(prompt, adapter=adapter)])
    assert built.modes.stats().merged == adapter.digest
    built.pool.release(adapter)
    built.pool.drop(adapter.digest)
    assert built.pool.stats().used_bytes > 0
    run_all(built, [make_sequence(prompt)])
    assert built.modes.stats().merged is None
    assert built.pool.stats().used_bytes == 0


def test_a_deleted_adapter_that_is_still_used_does_not_get_into_the_weights(
    folders: dict[str, Path],
) -> None:
    """Its requests have made the case for a merge, and go on."""
    built = make_engine(tiny_llama(), mode=Mode.AUTO)
    rows = StepCosts(base=((1, 1.0),), deltas=((1, ((1, 0.5),)),), switch_s=2.0)
    built.engine.modes = ModeController(rows, Mode.AUTO, built.engine.runner.merger, built.pool)
    adapter = admit(built, folders["all"])
    built.engine.add(make_sequence(random_prompt(8, seed=1), adapter=adapter))
    for _ in range(4):
        built.engine.step()
    assert built.engine.modes.stats().num_switches == 0
    built.pool.drop(adapter.digest)
    run_all(built, [])
    built.pool.release(adapter)
    assert built.engine.modes.stats().num_switches == 0
    assert built.pool.stats().used_bytes == 0


def test_merges_are_counted_for_the_adapters_merged_last(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mode_controller, "MAX_COUNTED", 2)
    built = make_engine(tiny_llama(), mode=Mode.MERGED)
    for name in ("all", "down", "all", "large"):
        adapter = admit(built, folders[name])
        run_all(built, [make_sequence(random_prompt(8, seed=1), adapter=adapter)])
        assert built.modes.num_switches_to(name) > 0
    counts = {name: built.modes.num_switches_to(name) for name in ("all", "down", "large")}
    assert counts == {"all": 2, "down": 0, "large": 1}
    assert built.modes.stats().num_switches == 4


def test_an_adapter_that_would_take_digits_from_others_is_served_unmerged(
    oracle: PeftModel, folders: dict[str, Path]
) -> None:
    built = make_engine(tiny_llama(), mode=Mode.MERGED)
    terms = read_terms(built, folders["all"])
    huge = built.pool.admit("huge", compose([(terms, 1e5)], names=["all"]))
    prompt = random_prompt(20, seed=1)
    sequences = [make_sequence(prompt, adapter=huge), make_sequence(prompt)]
    _, base = run_all(built, sequences)
    assert base == expected_tokens(oracle, None, prompt)
    assert built.modes.stats().num_switches == 0
    beside = [make_sequence(prompt, adapter=huge), make_sequence(prompt, adapter=huge)]
    other = make_sequence(prompt, adapter=admit(built, folders["down"]))
    run_all(built, [*beside, other])
    assert other.output_ids == expected_tokens(oracle, "down", prompt)
    assert built.modes.stats().merged == other.adapter_digest


def test_an_adapter_without_anything_to_fold_is_served_unmerged(
    oracle: PeftModel, folders: dict[str, Path]
) -> None:
    """And the next one is merged as ever."""
    built = make_engine(tiny_llama(), mode=Mode.MERGED)
    prompt = random_prompt(20, seed=1)
    norm = ModuleOverride(parameters={"weight": torch.full((64,), 2.0)})
    norms = built.pool.admit("norms", AdapterTerms(overrides={"model.norm": norm}))
    run_all(built, [make_sequence(prompt, adapter=norms)])
    assert built.modes.stats().num_switches == 0
    other = make_sequence(prompt, adapter=admit(built, folders["down"]))
    run_all(built, [other])
    assert other.output_ids == expected_tokens(oracle, "down", prompt)
    assert built.modes.stats().merged == other.adapter_digest


def test_a_merge_that_cannot_be_weighed_fails_nobody(
    oracle: PeftModel, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = make_engine(tiny_llama(), mode=Mode.MERGED)
    adapter, prompt = admit(built, folders["down"]), random_prompt(20, seed=1)

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(GroupTerms, "delta_norms", fail)
    (tokens,) = run_all(built, [make_sequence(prompt, adapter=adapter)])
    assert tokens == expected_tokens(oracle, "down", prompt)
    assert built.modes.stats().num_switches == 0
    built.pool.release(adapter)
    built.pool.drop(adapter.digest)
    assert built.pool.stats().used_bytes == 0


def test_room_is_made_of_a_merged_adapter_that_nobody_uses(
    built: BuiltEngine, folders: dict[str, Path]
) -> None:
    """Another would not get the slot before, and each step would merge it again."""
    adapter = admit(built, folders["all"])
    run_all(built, [make_sequence(random_prompt(8, seed=1), adapter=adapter)])
    assert not built.modes.make_room()
    assert built.modes.stats().merged == adapter.digest
    built.pool.release(adapter)
    assert built.modes.make_room()
    assert built.modes.stats().merged is None


def test_room_that_a_step_made_is_told_once(built: BuiltEngine, folders: dict[str, Path]) -> None:
    """Who asked for it before that step would otherwise wait for nothing."""
    adapter = admit(built, folders["all"])
    run_all(built, [make_sequence(random_prompt(8, seed=1), adapter=adapter)])
    built.pool.drop(adapter.digest)
    built.modes.before_step([], {})
    assert built.modes.stats().merged is None
    assert built.modes.make_room(doomed_only=True)
    assert not built.modes.make_room()


def test_bypass_never_merges(folders: dict[str, Path]) -> None:
    built = make_engine(tiny_llama(), mode=Mode.BYPASS)
    run_all(built, [make_sequence(random_prompt(8, seed=1), adapter=admit(built, folders["all"]))])
    assert built.modes.stats().num_switches == 0


def test_a_composition_is_merged_as_a_whole(folders: dict[str, Path]) -> None:
    """Merged or not, beside one of its own parts: the same tokens."""
    prompt = random_prompt(24, seed=3)
    found = []
    for mode in (Mode.BYPASS, Mode.MERGED):
        built = make_engine(tiny_llama(), mode=mode)
        parts = [(read_terms(built, folders[name]), weight) for name, weight in PARTS.items()]
        composed = built.pool.admit("sum", compose(parts, names=list(PARTS)))
        assert composed is not None
        alone = admit(built, folders["all"])
        sequences = [make_sequence(prompt, adapter=a) for a in (composed, composed, alone, None)]
        found.append(run_all(built, sequences))
        assert (built.modes.stats().num_merged_rows > 0) == (mode is Mode.MERGED)
    assert found[0] == found[1]
    assert len({tuple(tokens) for tokens in found[0]}) == 3


# What logits lose to rounding, beside the largest.
LOST = {ProductKind.BF16: 0.04, ProductKind.INT8: 0.08, ProductKind.W8A8: 0.12}


@pytest.mark.parametrize("kind", LOST)
@pytest.mark.parametrize("mode", [Mode.BYPASS, Mode.MERGED])
@torch.inference_mode()
def test_rounded_weights_serve_everybody_as_nearly(
    kind: ProductKind,
    mode: Mode,
    oracle: PeftModel,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of the adapter that the weights hold, of others, and of the base."""
    monkeypatch.setattr(merge, "_LARGEST_STEP", 100.0)
    if (reason := obstacle(kind, torch.ones(8, 8))) is not None:
        pytest.skip(reason)
    built = make_engine(tiny_llama(), base_product=kind, mode=mode, prefill_chunk=512)
    tasks = ["all", "all", "down", None]
    prompts = [random_prompt(20 + i, seed=i) for i in range(len(tasks))]
    sequences = [
        make_sequence(prompt, adapter=None if task is None else admit(built, folders[task]))
        for task, prompt in zip(tasks, prompts, strict=True)
    ]
    for sequence in sequences:
        built.engine.add(sequence)
    pieces = built.engine.scheduler.schedule()
    built.engine.modes.before_step(pieces, built.engine.scheduler.num_by_adapter)
    assert (built.modes.stats().merged is not None) is (mode is Mode.MERGED)
    sampled, logits = built.engine.runner.run(pieces)
    row_of = {piece.sequence.id: row for row, piece in enumerate(sampled)}
    for task, prompt, sequence in zip(tasks, prompts, sequences, strict=True):
        expected = peft_logits(oracle, task, prompt)
        lost = (logits[row_of[sequence.id]] - expected).abs().max() / expected.abs().max()
        assert float(lost) < LOST[kind], task
        if task is not None:  # or the adapter could be left out
            without = peft_logits(oracle, None, prompt)
            assert float((without - expected).abs().max() / expected.abs().max()) > 2 * LOST[kind]


def peft_logits(oracle: PeftModel, task: str | None, prompt: list[int]) -> torch.Tensor:
    """Logits [vocab] after a prompt."""
    ids = torch.tensor([prompt])
    if task is None:
        with oracle.disable_adapter():
            logits: torch.Tensor = oracle(ids).logits
    else:
        oracle.set_adapter(task)
        logits = oracle(ids).logits
    return logits[0, -1].clone()
