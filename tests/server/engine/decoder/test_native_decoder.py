"""Decoder layers in C++: whose are taken over, and that nothing changes by it."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn
from transformers import Ministral3Config, Ministral3ForCausalLM, PreTrainedModel

from dynamic_lora_adapters.apply import products
from dynamic_lora_adapters.apply.products import ProductKind, obstacle
from dynamic_lora_adapters.kernels.native_segments import reads_tiles
from dynamic_lora_adapters.native.head import Highest, NativeHead
from dynamic_lora_adapters.native.layer import (
    LayerStack,
    LayerStep,
    NativeLayer,
    delta_runs,
)
from dynamic_lora_adapters.segments import DeltaPlan
from dynamic_lora_adapters.terms import AdapterTerms, LinearTerms
from dynamic_lora_server.engine.attention import packed
from dynamic_lora_server.engine.attention.paged import PAGE_SIZE
from dynamic_lora_server.engine.decoder.native_decoder import NativeDecoder
from dynamic_lora_server.engine.engine import TokenEvent
from dynamic_lora_server.engine.startup.build import BuiltEngine
from dynamic_lora_server.modes import Mode
from tests.support.adapters import load_with_peft, make_adapter
from tests.support.engines import (
    ADAPTER_KINDS,
    NUM_TOKENS,
    admit,
    expected_tokens,
    make_engine,
    make_sequence,
    peft_greedy,
    random_prompt,
    recorded_logits,
    run_all,
)
from tests.support.models import TINY_MODELS, tiny_llama

REASON = obstacle(ProductKind.NATIVE, torch.ones(8, 8))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

TINY_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
PROJECTION = "model.layers.0.self_attn.o_proj"
TAKEN_OVER = ["llama", "mistral", "qwen2", "qwen3"]
REFUSALS = {
    "gemma2": "not all of them have the parts of a Llama layer",
    "granite": "their logits differ by",  # it scales its residuals
    "gpt2": "not all of them have the parts of a Llama layer",
}


def native_engine(model: PreTrainedModel, **options: Any) -> BuiltEngine:
    return make_engine(model, base_product=ProductKind.NATIVE, **options)


@pytest.fixture(scope="module", params=[Mode.BYPASS, Mode.MERGED])
def built(request: pytest.FixtureRequest) -> BuiltEngine:
    built = native_engine(tiny_llama(), mode=request.param)
    assert decoder_of(built).num_layers
    return built


def decoder_of(built: BuiltEngine) -> NativeDecoder:
    return built.engine.runner.decoder


@pytest.mark.parametrize("family", TAKEN_OVER)
def test_layers_of_the_llama_family_are_taken_over(family: str, tmp_path: Path) -> None:
    """With PEFT as the oracle, and beyond the sliding windows where there are some."""
    build = TINY_MODELS[family]
    folder = make_adapter(tmp_path / "a", build(), rank=4, targets="all-linear")
    oracle = load_with_peft(build(), {"a": folder})
    built = native_engine(build())
    assert decoder_of(built).num_layers == build().config.num_hidden_layers
    adapter = admit(built, folder)
    prompts = {"a": random_prompt(60, seed=1), None: random_prompt(11, seed=2)}
    sequences = [
        make_sequence(prompt, adapter=adapter if task else None) for task, prompt in prompts.items()
    ]
    for (task, prompt), tokens in zip(prompts.items(), run_all(built, sequences), strict=True):
        assert tokens == peft_greedy(oracle, task, prompt, NUM_TOKENS)


def test_layers_with_and_without_a_window_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2 may slide in some layers only; neighbours of one kind share a call."""
    calls: list[int] = []
    run = LayerStack.run

    def counting(self: LayerStack, step: LayerStep, hidden: torch.Tensor) -> torch.Tensor:
        calls.append(len(self._layers))
        return run(self, step, hidden)

    monkeypatch.setattr(LayerStack, "run", counting)
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    sizes = {"num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 16}
    build = TINY_MODELS["qwen2"]
    built = native_engine(build(**sizes, use_sliding_window=True))
    assert decoder_of(built).num_layers == 4
    calls.clear()
    prompt = random_prompt(40, seed=7)
    (tokens,) = run_all(built, [make_sequence(prompt)])
    own = make_engine(build(**sizes, use_sliding_window=True), native=False)
    assert tokens == run_all(own, [make_sequence(prompt)])[0]
    assert calls[-3:] == [2, 1, 1]


@pytest.mark.parametrize("family", sorted(REFUSALS))
def test_other_layers_are_left_alone_and_the_log_says_why(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    built = native_engine(TINY_MODELS[family]())
    assert not decoder_of(built).num_layers
    assert f"Decoder layers are transformers' own: {REFUSALS[family]}" in caplog.text


def test_what_only_late_positions_show_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    """Ministral 3 is a Llama whose queries grow from a position on."""
    caplog.set_level(logging.INFO)
    config = Ministral3Config(
        **TINY_SIZES,
        head_dim=16,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "original_max_position_embeddings": 64,
            "llama_4_scaling_beta": 0.5,
        },
    )
    torch.manual_seed(0)
    model = Ministral3ForCausalLM(config).eval()
    assert not decoder_of(native_engine(model)).num_layers
    assert "their logits differ by" in caplog.text


def test_rotary_tables_for_a_part_of_a_head_are_refused() -> None:
    runs = delta_runs(DeltaPlan(()))
    assert runs is not None
    step = LayerStep(torch.arange(3), torch.zeros(0, 3, dtype=torch.long), runs)
    table = torch.ones(3, 8)
    with pytest.raises(ValueError, match=r"rotary tables \(3, 8\) are not for heads of 16"):
        step.rotate_by(table, table, torch.arange(3), 16)


def test_a_trial_that_breaks_leaves_the_model_to_its_own_layers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise IndexError("what a model might do")

    monkeypatch.setattr(LayerStack, "run", broken)
    monkeypatch.setattr(NativeLayer, "attend", broken)
    prompt = random_prompt(9, seed=6)
    built = native_engine(tiny_llama())
    assert not decoder_of(built).num_layers
    assert "what a model might do" in caplog.text
    (tokens,) = run_all(built, [make_sequence(prompt)])
    (expected,) = run_all(make_engine(tiny_llama(), native=False), [make_sequence(prompt)])
    assert tokens == expected


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * nn.functional.silu(x)


@pytest.mark.parametrize("factor", [2.0, 1.01])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_only_looks_like_one_is_left_alone(
    factor: float, kv_dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """However much the cache rounds."""
    caplog.set_level(logging.INFO)
    model = tiny_llama()
    model.get_submodule("model.layers.1.mlp").act_fn = Scaled(factor)
    assert not decoder_of(native_engine(model, kv_dtype=kv_dtype)).num_layers
    assert "their logits differ by" in caplog.text


def test_a_model_with_more_around_its_layers_is_left_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    model = tiny_llama()
    model.base_model.add_module("extra_norm", nn.Identity())
    assert not decoder_of(native_engine(model)).num_layers
    assert "the model is made of embed_tokens, extra_norm, layers, norm, rotary_emb" in caplog.text


def test_products_of_another_kind_leave_the_layers_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    built = make_engine(tiny_llama(), base_product=ProductKind.PLAIN)
    assert not decoder_of(built).num_layers
    assert "its products are not in C++" in caplog.text


def test_a_cache_too_small_to_try_it_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    built = native_engine(tiny_llama(), kv_memory=2**13)
    assert not decoder_of(built).num_layers
    assert "the KV cache is too small for a probe" in caplog.text


def test_widths_that_are_no_multiple_of_a_vector(tmp_path: Path) -> None:
    """Where gate ends and up begins within one panel, and the last panel is not full."""
    sizes = {"intermediate_size": 101}
    folder = make_adapter(tmp_path / "a", tiny_llama(**sizes), rank=5, targets="all-linear")
    oracle = load_with_peft(tiny_llama(**sizes), {"a": folder})
    built = native_engine(tiny_llama(**sizes))
    assert decoder_of(built).num_layers
    prompt = random_prompt(9, seed=5)
    (tokens,) = run_all(built, [make_sequence(prompt, adapter=admit(built, folder))])
    assert tokens == peft_greedy(oracle, "a", prompt, NUM_TOKENS)


@settings(max_examples=25, deadline=None)
@given(
    cached_bytes=st.sampled_from([0, 2**13, packed.CACHED_BYTES]),
    tasks=st.lists(st.sampled_from([*ADAPTER_KINDS, None]), min_size=1, max_size=6),
    lengths=st.lists(st.integers(1, 70), min_size=6, max_size=6),
)
def test_any_batch_gives_the_tokens_of_peft(
    built: BuiltEngine,
    oracle: PeftModel,
    folders: dict[str, Path],
    cached_bytes: int,
    tasks: list[str | None],
    lengths: list[int],
) -> None:
    """Prompts in one piece and in several, short enough for the C++ and too long for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "CACHED_BYTES", cached_bytes)
        tokens = run_mixed(built, folders, tasks, lengths)
    prompts = [random_prompt(n, seed=n) for n in lengths]
    for task, prompt, actual in zip(tasks, prompts, tokens, strict=False):
        assert actual == expected_tokens(oracle, task, prompt)[:4]


def test_a_token_attended_to_elsewhere_beside_many_that_are_not(
    oracle: PeftModel, folders: dict[str, Path]
) -> None:
    """One whose keys lie in two pages decodes beside eleven whose keys lie in one."""
    built = native_engine(tiny_llama(), mode=Mode.BYPASS, paged=True)
    assert decoder_of(built).num_layers
    prompts = [random_prompt(n, seed=n) for n in (PAGE_SIZE + 5, *range(3, 14))]
    adapter = admit(built, folders["all"])
    tokens = run_all(built, [make_sequence(prompt, adapter=adapter) for prompt in prompts])
    assert tokens == [expected_tokens(oracle, "all", prompt) for prompt in prompts]


@pytest.mark.parametrize("num_threads", [1, 3, 16])
def test_threads_that_share_processors_wait_for_one_another(
    num_threads: int, oracle: PeftModel, folders: dict[str, Path]
) -> None:
    wanted = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        built = native_engine(tiny_llama(), mode=Mode.BYPASS)
        tasks = [*ADAPTER_KINDS, None] * 2
        owners = {task: admit(built, folders[task]) for task in ADAPTER_KINDS}
        prompts = [random_prompt(5 + number, seed=number) for number in range(len(tasks))]
        sequences = [
            make_sequence(prompt, adapter=owners.get(task) if task else None)
            for task, prompt in zip(tasks, prompts, strict=True)
        ]
        tokens = run_all(built, sequences)
    finally:
        torch.set_num_threads(wanted)
    assert tokens == [
        expected_tokens(oracle, task, prompt) for task, prompt in zip(tasks, prompts, strict=True)
    ]


def test_layers_with_and_without_deltas_in_turns_give_the_same_each_time(tmp_path: Path) -> None:
    """Threads that are not done with a layer must not see what the next one's deltas are."""
    model = partial(tiny_llama, num_hidden_layers=6)
    folders = [
        make_adapter(
            tmp_path / str(number),
            model(),
            rank=4,
            targets=["q_proj", "o_proj", "gate_proj", "down_proj"],
            layers_to_transform=[number, number + 2],
            magnitude=1.0,
            seed=number,
        )
        for number in range(3)
    ]
    built = native_engine(model(), mode=Mode.BYPASS)
    owners = [None, *(admit(built, folder) for folder in folders)]

    def run() -> list[list[int]]:
        prompts = [random_prompt(5 + number, seed=number) for number in range(9)]
        return run_all(
            built,
            [make_sequence(prompt, adapter=owners[i % 4]) for i, prompt in enumerate(prompts)],
        )

    first = run()
    assert all(run() == first for _ in range(150))


def run_mixed(
    built: BuiltEngine, folders: dict[str, Path], tasks: list[str | None], lengths: list[int]
) -> list[list[int]]:
    """Four tokens for a prompt of each task."""
    prompts = [random_prompt(n, seed=n) for n in lengths[: len(tasks)]]
    adapters = [None if task is None else admit(built, folders[task]) for task in tasks]
    sequences = [
        make_sequence(prompt, adapter=adapter, max_new_tokens=4)
        for prompt, adapter in zip(prompts, adapters, strict=True)
    ]
    tokens = run_all(built, sequences)
    for adapter in adapters:
        if adapter is not None:
            built.pool.release(adapter)
    return tokens


def test_terms_of_other_kinds_go_through_the_models_own_layers(
    oracle: PeftModel, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only as long as a row needs them: after it the steps are in C++."""
    served: list[bool] = []
    delta_runs_of = NativeDecoder._delta_runs

    def watching(self: NativeDecoder, step: Any) -> Any:
        runs = delta_runs_of(self, step)
        served.append(runs is not None)
        return runs

    def run(built: BuiltEngine) -> list[list[int]]:
        scale = LinearTerms(scale=torch.full((64,), 0.5))
        scaled = built.pool.admit("scaled", AdapterTerms(linears={PROJECTION: scale}))
        sequences = [
            make_sequence(prompt, adapter=admit(built, folders["all"])),
            make_sequence(prompt, adapter=scaled, max_new_tokens=3),
        ]
        return run_all(built, sequences)

    prompt = random_prompt(10, seed=3)
    own = native_engine(tiny_llama(), mode=Mode.BYPASS)
    decoder_of(own).give_back()
    expected = run(own)
    built = native_engine(tiny_llama(), mode=Mode.BYPASS)
    monkeypatch.setattr(NativeDecoder, "_delta_runs", watching)
    assert run(built) == expected
    assert expected[0] == expected_tokens(oracle, "all", prompt)
    assert expected[1] != expected[0][:3]
    assert served == [False] * 3 + [True] * 7


@pytest.mark.parametrize(
    ("reader", "num_found"),
    [
        ({}, 10),
        ({"temperature": 0.7}, 6),
        ({"logprobs": True}, 10),
        ({"logprobs": True, "prompt_logprobs": True}, 6),
        ({"top_logprobs": 2}, 6),
        ({"repetition_penalty": 1.3}, 6),
        ({"frequency_penalty": 0.5}, 6),
    ],
)
def test_logits_are_written_for_steps_that_read_them_alone(
    reader: dict[str, Any], num_found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten greedy tokens, the first four beside a sequence that may read logits."""
    found = counted_heads(monkeypatch)
    built = native_engine(tiny_llama(), mode=Mode.BYPASS)
    plain = make_sequence(random_prompt(5, seed=1))
    other = make_sequence(random_prompt(9, seed=2), max_new_tokens=4, **reader)
    tokens, _ = run_all(built, [plain, other])
    assert len(found) == num_found
    (alone,) = run_all(native_engine(tiny_llama()), [make_sequence(plain.prompt_ids)])
    assert tokens == alone


def test_log_probabilities_are_the_same_with_and_without_logits() -> None:
    def told(**others: Any) -> list[float]:
        built = native_engine(tiny_llama(), mode=Mode.BYPASS)
        sequence = make_sequence(random_prompt(5, seed=1), logprobs=True, **others)
        built.engine.add(sequence)
        events = [event for _ in range(10) for event in built.engine.step()]
        assert not built.engine.has_work
        tokens = [event.sampled for event in events if isinstance(event, TokenEvent)]
        return [one.logprob for one in tokens if one.logprob is not None]

    found, expected = told(), told(top_logprobs=1)
    assert len(found) == 10
    assert found == pytest.approx(expected, abs=1e-5)


def test_log_probabilities_are_told_to_those_who_ask_alone() -> None:
    built = native_engine(tiny_llama(), mode=Mode.BYPASS)
    asking = [make_sequence([1, 2, number], logprobs=number % 2 == 0) for number in range(3, 7)]
    for sequence in asking:
        built.engine.add(sequence)
    events = [event for _ in range(11) for event in built.engine.step()]
    told: dict[int, list[float | None]] = {sequence.id: [] for sequence in asking}
    for event in events:
        if isinstance(event, TokenEvent):
            told[event.sequence_id].append(event.sampled.logprob)
    for sequence in asking:
        alone = make_sequence(sequence.prompt_ids, logprobs=True)
        fresh = native_engine(tiny_llama(), mode=Mode.BYPASS)
        fresh.engine.add(alone)
        expected = [
            event.sampled.logprob
            for _ in range(11)
            for event in fresh.engine.step()
            if isinstance(event, TokenEvent)
        ]
        wanted = expected if sequence.sampling.logprobs else [None] * 10
        assert told[sequence.id] == pytest.approx(wanted, abs=1e-5)


def test_logits_are_written_where_an_adapter_changes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = counted_heads(monkeypatch)
    folder = make_adapter(tmp_path / "a", tiny_llama(), rank=4, targets=["lm_head"], magnitude=1.0)
    built = native_engine(tiny_llama(), mode=Mode.BYPASS)
    prompt = random_prompt(5, seed=1)
    changed = make_sequence(prompt, adapter=admit(built, folder), max_new_tokens=4)
    plain = make_sequence(prompt)
    run_all(built, [plain, changed])
    assert len(found) == 6
    oracle = load_with_peft(tiny_llama(), {"a": folder})
    assert changed.output_ids == peft_greedy(oracle, "a", prompt, 4)
    assert plain.output_ids == peft_greedy(oracle, None, prompt, 10)


def counted_heads(monkeypatch: pytest.MonkeyPatch) -> list[Highest]:
    """A list that gets what every head without logits finds from now on."""
    found: list[Highest] = []
    call = NativeHead.__call__

    def counting(self: NativeHead, *args: Any, **options: Any) -> Highest:
        found.append(call(self, *args, **options))
        return found[-1]

    monkeypatch.setattr(NativeHead, "__call__", counting)
    return found


@pytest.fixture(scope="module")
def odd_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose ranks make no pairs."""
    ranks = {"q_proj": 3, "k_proj": 1, "v_proj": 5, "gate_proj": 7, "down_proj": 1}
    return make_adapter(
        tmp_path_factory.mktemp("odd") / "a",
        tiny_llama(),
        rank=9,
        targets="all-linear",
        rank_pattern=ranks,
    )


@pytest.mark.parametrize(
    ("kind", "in_bytes", "step"),
    [
        (ProductKind.INT8, False, 1e-3),
        (ProductKind.INT8, True, 1e-2),
        (ProductKind.W8A8, True, 2e-2),
        (ProductKind.BF16, False, 2e-2),
    ],
)
@pytest.mark.parametrize("name", ["all", "odd ranks"])
def test_layers_with_rounded_weights_give_the_logits_of_their_products(
    kind: ProductKind,
    in_bytes: bool,
    step: float,
    name: str,
    folders: dict[str, Path],
    odd_ranks: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the adapter on most rows, beside one that has none; with its factors `in_bytes`, which
    of int8 they are on some processors only."""

    def record(*, layers: bool) -> torch.Tensor:
        built = make_engine(tiny_llama(), base_product=kind, mode=Mode.BYPASS, prefill_chunk=128)
        assert (built.pool.factor_dtype is torch.uint8) is in_bytes
        if not layers:
            decoder_of(built).give_back()
        assert bool(decoder_of(built).num_layers) is layers
        logits.clear()
        adapter = admit(built, folder)
        sequences = [make_sequence(prompt, adapter=adapter, max_new_tokens=1)]
        sequences += [make_sequence(prompt[:9], max_new_tokens=1)]
        sequences += [make_sequence(prompt[:n], adapter=adapter, max_new_tokens=1) for n in (3, 5)]
        run_all(built, sequences)
        return torch.cat(logits)

    monkeypatch.setattr(products, "doubles_by_eight_bits", lambda: in_bytes)
    if reads_tiles():  # what deltas read is rounded to bfloat16, whatever the products read
        step = max(step, 5e-3)
    folder = odd_ranks if name == "odd ranks" else folders[name]
    prompt = random_prompt(100, seed=4)  # more rows than are multiplied by narrow weights
    logits = recorded_logits(monkeypatch)
    out, expected = record(layers=True), record(layers=False)
    # Inputs are rounded: a difference in float32's last place may grow to one step.
    assert (out - expected).abs().max() < step * expected.abs().max()


def test_a_merged_adapter_is_taken_from_the_rows_of_others_with_rounded_weights(
    folders: dict[str, Path], odd_ranks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such rows have two deltas, of which one is taken away."""

    def record(*, layers: bool) -> torch.Tensor:
        built = make_engine(tiny_llama(), base_product=ProductKind.BF16, mode=Mode.MERGED)
        if not layers:
            decoder_of(built).give_back()
        assert bool(decoder_of(built).num_layers) is layers
        logits.clear()
        adapters = [admit(built, folder) for folder in (folders["all"], odd_ranks)]
        sequences = [make_sequence(prompt, adapter=adapters[0], max_new_tokens=1)]
        sequences += [
            make_sequence(prompt[:n], adapter=adapters[1], max_new_tokens=1) for n in (9, 5)
        ]
        sequences += [make_sequence(prompt[:7], max_new_tokens=1)]
        run_all(built, sequences)
        merged = built.engine.runner.merger.merged
        assert merged in adapters
        return torch.cat(logits)

    prompt = random_prompt(11, seed=6)
    logits = recorded_logits(monkeypatch)
    out, expected = record(layers=True), record(layers=False)
    assert (out - expected).abs().max() < 2e-2 * expected.abs().max()
