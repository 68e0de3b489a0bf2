"""The machine's limit: its arithmetic, and one measurement on a small model."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.clock import Clock
from benchmarks.limit import MachineLimit
from benchmarks.limit_rate import pieces, tokens_per_s


def test_prompts_and_steps_make_a_rate() -> None:
    # The prompts give the first token of each client, 10 steps the others.
    rate = tokens_per_s(num_clients=4, num_output_tokens=11, step_s=0.1, prefill_s=1.0)
    assert rate == pytest.approx(4 * 11 / 2.0)


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(64, [64]), (512, [512]), (1100, [512, 512, 76])]
)
def test_prompts_are_cut_into_pieces(num_tokens: int, expected: list[int]) -> None:
    assert pieces(num_tokens, 512) == expected


@pytest.fixture(scope="module")
def limit(tmp_path_factory: pytest.TempPathFactory) -> MachineLimit:
    folder: Path = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return MachineLimit(folder, "float32")


def test_the_weights_are_those_of_all_products(limit: MachineLimit) -> None:
    layer = 32 * (32 + 16 + 16) + 32 * 32 + 32 * 96 + 48 * 32
    assert limit.weight_bytes == 4 * (2 * layer + 64 * 32)


def test_one_client_is_bound_by_memory_and_many_by_products(limit: MachineLimit) -> None:
    one, many = limit.measure(1, 4, 3), limit.measure(8, 4, 3)
    assert (one.bound, many.bound) == ("memory", "products")
    assert one.step_s == pytest.approx(limit.weight_bytes / (one.gbytes_per_s * 1e9))
    assert many.tokens_per_s == pytest.approx(8 * 3 / (many.prefill_s + 2 * many.step_s))
    assert many.prefill_s > 0


def test_the_clock_reads_a_rate() -> None:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert Clock(seconds=0.01).read() > 0
    finally:
        torch.set_num_threads(num_threads)
