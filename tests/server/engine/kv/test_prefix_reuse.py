"""Prompts that begin alike: computed once for each adapter content, with the same answers."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from dynamic_lora_adapters.device.slab import ResidentAdapter
from dynamic_lora_adapters.home.registry import AdapterRegistry
from dynamic_lora_adapters.terms import AdapterTerms, LinearTerms
from dynamic_lora_server.engine import sequence
from dynamic_lora_server.engine.engine import FailedEvent, TokenEvent
from dynamic_lora_server.engine.startup.build import BuiltEngine
from dynamic_lora_server.modes import Mode
from tests.support.conformance.architectures import ARCHITECTURES
from tests.support.conformance.bench import Bench
from tests.support.conformance.checkpoints import save_checkpoint
from tests.support.conformance.kinds import INVOCATION_IDS, KINDS
from tests.support.engines import (
    ADAPTER_KINDS,
    NUM_TOKENS,
    admit,
    expected_tokens,
    make_engine,
    make_sequence,
    random_prompt,
    run_all,
)
from tests.support.models import tiny_llama

TASKS = [None, "all", "attention"]
BLOCK_BYTES = 16 * 512  # of the tiny model's KV entries


@pytest.fixture(scope="module", params=[False, True], ids=["contiguous", "paged"])
def paged(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def engine(paged: bool) -> BuiltEngine:
    return make_engine(tiny_llama(), paged=paged)


@pytest.fixture
def built(engine: BuiltEngine) -> BuiltEngine:
    """The module's engine with nothing in its prefix cache."""
    engine.engine.scheduler.forget_prefixes()
    return engine


@pytest.fixture(scope="module")
def plain(paged: bool) -> BuiltEngine:
    return make_engine(tiny_llama(), paged=paged, prefix_cache_memory=0)


def adapter(
    built: BuiltEngine, folders: dict[str, Path], task: str | None
) -> ResidentAdapter | None:
    return None if task is None else admit(built, folders[task])


def make_wave(
    built: BuiltEngine, folders: dict[str, Path], prompts: Sequence[list[int]]
) -> list[sequence.Sequence]:
    return [
        make_sequence(prompt, adapter=adapter(built, folders, task), logprobs=True)
        for task in TASKS
        for prompt in prompts
    ]


def run_with_logprobs(
    built: BuiltEngine, wave: Sequence[sequence.Sequence]
) -> list[list[tuple[int, float]]]:
    """Each sequence's tokens with their log-probabilities."""
    tokens: dict[int, list[tuple[int, float]]] = {one.id: [] for one in wave}
    for one in wave:
        built.engine.add(one)
    while built.engine.has_work:
        for event in built.engine.step():
            assert isinstance(event, TokenEvent), event
            assert event.sampled.logprob is not None
            tokens[event.sequence_id].append((event.sampled.token_id, event.sampled.logprob))
    built.engine.scheduler.check_integrity()
    return list(tokens.values())


def test_answers_are_the_same_with_and_without(
    built: BuiltEngine, plain: BuiltEngine, folders: dict[str, Path]
) -> None:
    template = random_prompt(300, seed=1)
    waves = [
        [template + random_prompt(5 + i, seed=10 + i)] + [template[:200] + random_prompt(9, seed=i)]
        for i in range(3)
    ]
    for number, prompts in enumerate(waves):
        wave = make_wave(built, folders, prompts)
        found = run_with_logprobs(built, wave)
        expected = run_with_logprobs(plain, make_wave(plain, folders, prompts))
        for one, actual, wanted in zip(wave, found, expected, strict=True):
            assert [token for token, _ in actual] == [token for token, _ in wanted]
            assert [lp for _, lp in actual] == pytest.approx([lp for _, lp in wanted], abs=1e-4)
            if number:
                assert one.num_reused in {288, 192}
    assert plain.engine.scheduler.prefix_stats().num_looked_up == 0


def test_adapters_share_nothing_with_one_another(
    built: BuiltEngine, oracle: PeftModel, folders: dict[str, Path]
) -> None:
    prompt = random_prompt(60, seed=3)
    for run in range(2):
        wave = [
            make_sequence(prompt, adapter=adapter(built, folders, task))
            for task in [*ADAPTER_KINDS, None]
        ]
        tokens = run_all(built, wave)
        assert [one.num_reused for one in wave] == [48 * run] * len(wave)
        for task, actual in zip([*ADAPTER_KINDS, None], tokens, strict=True):
            assert actual == expected_tokens(oracle, task, prompt), task


def test_a_burst_of_one_template_computes_it_once(
    built: BuiltEngine, oracle: PeftModel, folders: dict[str, Path]
) -> None:
    template = random_prompt(128, seed=4)
    prompts = [template + random_prompt(7, seed=20 + i) for i in range(6)]
    shared = admit(built, folders["all"])
    wave = [make_sequence(prompt, adapter=shared) for prompt in prompts]
    tokens = run_all(built, wave)
    # The last token of an output is never run.
    assert [one.num_run - (NUM_TOKENS - 1) for one in wave] == [135] + [7] * 5
    assert tokens == [expected_tokens(oracle, "all", prompt) for prompt in prompts]


def test_what_is_known_of_a_prompt_does_not_count_among_its_tokens_to_go(
    built: BuiltEngine,
) -> None:
    known = random_prompt(100, seed=9)
    run_all(built, [make_sequence(known)])
    long, shorter = (make_sequence(random_prompt(n, seed=n)) for n in (200, 60))
    again = make_sequence(known + random_prompt(5, seed=11))
    for one in (long, shorter, again):
        built.engine.add(one)
    built.engine.step()
    assert (long.num_computed, shorter.num_computed) == (16, 7)
    assert (again.num_reused, len(again.output_ids)) == (96, 1)
    for one in (long, shorter, again):
        built.engine.cancel(one)


def test_what_a_cancelled_prompt_has_computed_is_kept(
    built: BuiltEngine, oracle: PeftModel
) -> None:
    prompt = random_prompt(100, seed=5)
    cancelled = make_sequence(prompt)
    built.engine.add(cancelled)
    built.engine.step()
    built.engine.step()
    built.engine.cancel(cancelled)
    again = make_sequence(prompt)
    assert run_all(built, [again]) == [expected_tokens(oracle, None, prompt)]
    assert (cancelled.num_computed, again.num_reused) == (64, 64)


def test_a_cache_that_is_always_full(paged: bool, oracle: PeftModel) -> None:
    memory = BLOCK_BYTES * (16 if paged else 2)
    built = make_engine(tiny_llama(), paged=paged, prefix_cache_memory=memory)
    prompts = [random_prompt(20 + 9 * i, seed=i % 3) for i in range(6)]
    for _ in range(2):
        for start in (0, 3):
            wave = prompts[start : start + 3]
            tokens = run_all(built, [make_sequence(prompt) for prompt in wave])
            assert tokens == [expected_tokens(oracle, None, prompt) for prompt in wave]
    assert built.engine.scheduler.prefix_stats().num_evictions > 0


def test_the_next_turn_computes_no_answer_anew(
    built: BuiltEngine, oracle: PeftModel, folders: dict[str, Path]
) -> None:
    for number, task in enumerate(TASKS):
        prompt = random_prompt(30, seed=40 + number)
        first = make_sequence(prompt, adapter=adapter(built, folders, task), max_new_tokens=40)
        (answer,) = run_all(built, [first])
        turn = [*prompt, *answer, *random_prompt(9, seed=50 + number)]
        second, of_base = make_sequence(turn, adapter=first.adapter), make_sequence(turn)
        (found,) = run_all(built, [second])
        assert found == expected_tokens(oracle, task, turn)
        # 69 of 70 tokens of the turn before were run.
        assert (second.num_cached_prompt, second.num_run) == (64, 79 - 64 + NUM_TOKENS - 1)
        run_all(built, [of_base])
        assert of_base.num_cached_prompt == (64 if task is None else 0)


def test_no_draft_that_was_wrong_is_kept(
    paged: bool, oracle: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = make_engine(tiny_llama(), paged=paged, speculate=4)
    drafter = built.engine.scheduler.drafter
    assert drafter is not None

    def draft(decoding: Sequence[sequence.Sequence], room: int) -> dict[int, tuple[int, ...]]:
        del room
        return {
            one.id: (7, 8, 9, 10)[: one.sampling.max_new_tokens - one.num_output - 1]
            for one in decoding
        }

    monkeypatch.setattr(drafter, "draft", draft)
    prompt = random_prompt(20, seed=60)
    first = make_sequence(prompt, max_new_tokens=29)
    (answer,) = run_all(built, [first])
    assert built.engine.scheduler.draft_stats().num_drafted > 0
    turn = [*prompt, *answer, *random_prompt(5, seed=61)]
    second = make_sequence(turn)
    assert run_all(built, [second]) == [expected_tokens(oracle, None, turn)]
    assert second.num_cached_prompt == 48


def test_a_broken_step_forgets_what_it_may_not_have_copied(
    built: BuiltEngine, oracle: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_prompt(40, seed=6)
    built.engine.add(make_sequence(prompt, max_new_tokens=1))
    while built.engine.has_work:
        built.engine.step()
    assert built.engine.scheduler.prefix_stats().num_blocks == 2

    def fail(_copies: object) -> None:
        raise RuntimeError("no memory for copies")

    with monkeypatch.context() as patch:
        patch.setattr(built.engine.runner.cache, "copy", fail)
        built.engine.add(make_sequence(prompt))
        (event,) = built.engine.step()
    assert isinstance(event, FailedEvent)
    assert "no memory for copies" in event.message
    assert built.engine.scheduler.prefix_stats().num_blocks == 0
    again = make_sequence(prompt)
    assert run_all(built, [again]) == [expected_tokens(oracle, None, prompt)]
    assert again.num_reused == 0


def test_what_was_computed_merged_serves_the_bypass(
    paged: bool, oracle: PeftModel, folders: dict[str, Path]
) -> None:
    built = make_engine(tiny_llama(), paged=paged, mode=Mode.MERGED)
    prompt = random_prompt(60, seed=7)
    merged, other = admit(built, folders["all"]), admit(built, folders["down"])
    first = make_sequence(prompt, adapter=merged)
    run_all(built, [first])
    assert first.num_merged == first.num_run
    second = make_sequence(prompt, adapter=merged)
    run_all(built, [second, *(make_sequence(prompt, adapter=other) for _ in range(4))])
    assert (second.num_reused, second.num_merged) == (48, 0)
    assert first.output_ids == second.output_ids == expected_tokens(oracle, "all", prompt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_merge_of_others_has_rounded_is_not_kept(
    paged: bool, dtype: torch.dtype, folders: dict[str, Path]
) -> None:
    base = tiny_llama()
    torch.nn.Module.to(base, dtype)
    built = make_engine(base, paged=paged, mode=Mode.MERGED)
    prompt = random_prompt(60, seed=12)
    merged = admit(built, folders["all"])
    beside = make_sequence(prompt)
    run_all(built, [beside, *(make_sequence(prompt, adapter=merged) for _ in range(4))])
    again, of_base = make_sequence(prompt, adapter=merged), make_sequence(prompt)
    run_all(built, [again])
    assert (again.num_merged, again.num_reused) == (again.num_run, 48)
    run_all(built, [of_base])
    # Its first piece of 32 tokens ran alone, before the merge.
    assert of_base.num_reused == (48 if dtype == torch.float32 else 32)


def test_logits_that_are_no_numbers_cost_nobody_else_a_prefix(
    built: BuiltEngine, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = random_prompt(40, seed=5)
    run_all(built, [make_sequence(prompt)])
    num_kept = built.engine.scheduler.prefix_stats().num_blocks
    huge = LinearTerms(a=torch.full((4, 64), 1e30), b=torch.full((64, 4), 1e30))
    path = "model.layers.0.self_attn.o_proj"
    broken = built.pool.admit("huge", AdapterTerms(linears={path: huge}))
    failing = [
        make_sequence(prompt, adapter=broken, prompt_logprobs=told) for told in (False, True)
    ]
    for one in failing:
        built.engine.add(one)
    events = [event for _ in range(4) for event in built.engine.step()]
    assert [type(event) for event in events] == [FailedEvent, FailedEvent]
    assert not built.engine.has_work
    assert built.engine.scheduler.prefix_stats().num_blocks == num_kept
    assert not caplog.records  # the step was sound
    again = make_sequence(prompt)
    run_all(built, [again])
    assert again.num_reused == 32


@pytest.mark.parametrize("kind", ["aLoRA", "prefix tuning", "prompt tuning"])
def test_kinds_that_do_not_act_on_all_tokens_alike(
    built: BuiltEngine, kind: str, tmp_path: Path
) -> None:
    base = tiny_llama()
    save_checkpoint(tmp_path / "a", KINDS[kind], ARCHITECTURES["llama"], base, size=1)
    prompt = random_prompt(70, seed=8)
    prompt[40:43] = INVOCATION_IDS
    with AdapterRegistry(tmp_path / "home", built.geometry, base=built.weights) as registry:
        bench = Bench(base=base, built=built, registry=registry)
        with bench.serving("a", tmp_path / "a") as served:

            def run(adapter: ResidentAdapter | None) -> tuple[int, list[tuple[int, float]]]:
                one = make_sequence(prompt, adapter=adapter, logprobs=True)
                (answer,) = run_with_logprobs(built, [one])
                return one.num_reused, answer

            _, cold = run(served)
            _, base_answer = run(None)
            num_reused, warm = run(served)
            assert num_reused >= 64
            built.engine.scheduler.forget_prefixes()
            run(None)
            num_shared, after_base = run(served)
    # The two blocks before the invocation are the base model's.
    assert num_shared == (32 if kind == "aLoRA" else 0)
    for answer in (warm, after_base):
        assert [token for token, _ in answer] == [token for token, _ in cold]
        assert [lp for _, lp in answer] == pytest.approx([lp for _, lp in cold], abs=1e-4)
    assert [lp for _, lp in base_answer] != pytest.approx([lp for _, lp in cold], abs=1e-2)
