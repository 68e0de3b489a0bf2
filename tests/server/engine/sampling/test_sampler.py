import math
from collections import Counter
from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dynamic_lora_adapters.native.draws import Draw
from dynamic_lora_adapters.native.sampling import NativeSampling, native_sampling
from dynamic_lora_adapters.transfer import to_device
from dynamic_lora_server.engine.sampling import adjustments, sampler
from dynamic_lora_server.engine.sampling.adjustments import ScoredRow
from dynamic_lora_server.engine.sampling.sampler import Sampled, _filter
from dynamic_lora_server.engine.sequence import Sequence
from tests.support.engines import make_sequence

VOCAB = 50
NATIVE = native_sampling()
SAMPLING: list[NativeSampling | None] = [None]


@pytest.fixture(scope="module", autouse=True, params=["torch", "native"])
def _sampling(request: pytest.FixtureRequest) -> None:
    """Everything here holds whether torch chooses tokens or C++ does."""
    if request.param == "native" and NATIVE is None:
        pytest.skip("there is no C++ compiler")
    SAMPLING[:] = [NATIVE if request.param == "native" else None]


def sample(scores: torch.Tensor, sequences: Seq[Sequence]) -> list[Sampled | None]:
    return sampler.choose(scores, list(map(ScoredRow, sequences)), SAMPLING[0]).read()


def logits(seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def tokens(scores: torch.Tensor, *sequences: Sequence) -> list[int]:
    tokens = sample(scores, sequences)
    return [sampled.token_id for sampled in tokens if sampled is not None]


def test_greedy_takes_the_most_likely() -> None:
    scores = logits(rows=3)
    rows = [make_sequence([1]) for _ in range(3)]
    assert tokens(scores, *rows) == scores.argmax(-1).tolist()


def test_a_long_prompt_is_brought_to_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each token that is penalised by it."""
    brought: list[object] = []

    def counted(values: object, *args: Any) -> torch.Tensor:
        brought.append(values)
        return to_device(values, *args)

    monkeypatch.setattr(adjustments, "to_device", counted)
    prompt = [3, 4] * 500
    sequence = make_sequence(prompt, repetition_penalty=5.0, max_new_tokens=9)
    for _ in range(9):
        sequence.output_ids += tokens(logits(), sequence)
    assert brought.count(tuple(prompt)) == 1
    assert sum(len(values) for values in brought if isinstance(values, list | tuple)) < 1200


def test_draws_follow_the_distribution() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    count = 4000
    drawn = Counter(
        tokens(scores, make_sequence([1], temperature=1.0, seed=seed))[0] for seed in range(count)
    )
    for token, probability in enumerate(torch.softmax(scores[0], -1).tolist()):
        # Four standard deviations of a binomial.
        margin = 4 * math.sqrt(count * probability * (1 - probability))
        assert abs(drawn[token] - count * probability) < margin


def test_a_row_draws_the_same_whatever_else_is_in_the_batch() -> None:
    scores = logits(rows=4)
    alone = [
        tokens(scores[i : i + 1], make_sequence([1], temperature=0.9, seed=i))[0] for i in range(4)
    ]
    others = [make_sequence([1], temperature=0.9, seed=i) for i in range(4)]
    assert tokens(scores, *others) == alone
    mixed = [make_sequence([1], top_k=3, temperature=2.0, seed=99), others[1]]
    assert tokens(scores[:2], *mixed)[1] == alone[1]


def test_rounding_of_the_logits_does_not_move_a_draw() -> None:
    """Another batch may bring differences of this size; a vocabulary of 50,000, 200 draws."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 50_000, generator=generator) * 3
    rounded = scores + torch.randn(scores.shape, generator=generator) * 1e-6
    sequences = [make_sequence([1], temperature=1.0, seed=seed) for seed in range(200)]
    assert tokens(scores, *sequences) == tokens(rounded, *sequences)


@given(
    seed=st.integers(0, 100),
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, VOCAB),
    # Closer to 1 the tail that it cuts is smaller than the rounding of the sums.
    top_p=st.floats(0.05, 0.999) | st.just(1.0),
    min_p=st.floats(0, 0.5),
)
@example(seed=0, temperature=0.5, top_k=0, top_p=1.0, min_p=0.0)
@settings(max_examples=100, deadline=None)
def test_filters_keep_the_tokens_that_transformers_keeps(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    scores = logits(seed)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:  # as `generate` does it
        warpers.append(TopPLogitsWarper(top_p))
    warpers.append(MinPLogitsWarper(min_p))
    expected = warpers(torch.LongTensor([[1]]), torch.FloatTensor(scores)).isfinite()
    draw = Draw(row=0, key=0, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    actual = _filter(scores / temperature, [draw]).isfinite()
    # At an exact boundary rounding may keep one token more or less.
    assert (expected ^ actual).sum() <= 1
    assert actual.any()


@pytest.mark.parametrize(
    "params", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=lambda p: str(*p)
)
def test_the_strictest_filters_are_greedy(params: dict[str, Any]) -> None:
    scores = logits()
    sequence = make_sequence([1], temperature=1.0, seed=4, **params)
    assert tokens(scores, sequence) == [int(scores.argmax())]


def test_repetition_penalty_is_transformers_over_prompt_and_output() -> None:
    scores = logits()
    sequence = make_sequence([3, 4, 5], repetition_penalty=1.7)
    sequence.output_ids += [int(scores.argmax()), 9]
    seen = torch.tensor([sequence.tokens(0, sequence.num_tokens)])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(seen, scores.clone())
    assert tokens(scores, sequence) == [int(expected.argmax())]


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    scores = torch.zeros(1, 4)
    scores[0] = torch.tensor([1.0, 0.9, 0.8, 0.0])
    once = make_sequence([0, 0, 0], presence_penalty=0.15)
    assert tokens(scores, once) == [0]
    once.output_ids.append(0)
    assert tokens(scores, once) == [1]
    twice = make_sequence([1], frequency_penalty=0.15)
    twice.output_ids += [0, 0, 1]
    assert tokens(scores, twice) == [2]


def test_penalties_pass_over_virtual_tokens() -> None:
    scores = torch.tensor([[2.0, 1.9, 0.1, 0.0]])
    sequence = make_sequence([2], repetition_penalty=2.0, frequency_penalty=1.0)
    sequence.prompt_ids = (0, 0, 0, *sequence.prompt_ids)
    sequence.num_virtual = 3
    assert tokens(scores, sequence) == [0]
    sequence.output_ids.append(0)
    assert tokens(scores, sequence) == [1]


def test_penalties_leave_the_callers_logits_alone() -> None:
    scores = logits()
    before = scores.clone()
    sample(scores, [make_sequence([1, 2], repetition_penalty=2.0)])
    assert torch.equal(scores, before)


def test_logprobs_are_the_models_own() -> None:
    scores = logits(rows=2)
    expected = torch.log_softmax(scores, -1)
    plain = make_sequence([1])
    asked = make_sequence([1], temperature=3.0, logprobs=True, top_logprobs=3, top_k=5)
    first, second = sample(scores, [plain, asked])
    assert first is not None and second is not None
    assert first.logprob is None
    assert first.top == ()
    assert second.logprob == pytest.approx(float(expected[1, second.token_id]), rel=1e-5)
    best = expected[1].topk(3)
    assert [token for token, _ in second.top] == best.indices.tolist()
    assert [value for _, value in second.top] == pytest.approx(best.values.tolist(), abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}])
def test_logits_that_are_no_numbers_give_no_token(value: float, params: dict[str, Any]) -> None:
    scores = torch.zeros(3, 8)
    scores[1, 5] = value
    tokens = sample(scores, [make_sequence([1], **params) for _ in range(3)])
    assert [token is None for token in tokens] == [False, True, False]


def test_a_row_of_nothing_but_minus_infinity_gives_no_token() -> None:
    assert sample(torch.full((1, 8), -math.inf), [make_sequence([1])]) == [None]
