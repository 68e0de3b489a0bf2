"""Popularities, exact prompts and the sequence of requests."""

import random
from collections import Counter
from itertools import islice
from typing import Any

import pytest

from benchmarks.errors import InvalidWorkload
from benchmarks.workload import (
    Popularity,
    PromptMaker,
    Sampling,
    Workload,
    requests,
    warm_up_requests,
)


class _WordTokenizer:
    """One token a word, and one for the beginning, as Llama's tokenizers have it."""

    def __init__(self, words: list[str]) -> None:
        self._words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self._words)}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = [hash(word) for word in text.split()]
        return [0, *ids] if add_special_tokens else ids


def _prompts(num_tokens: int = 12) -> PromptMaker:
    words = ["alpha", "beta", "gamma", "delta", "Upper", "x1", "é"]
    return PromptMaker(_WordTokenizer(words), num_tokens)


def _workload(popularity: str = "uniform", **options: Any) -> Workload:
    length = {} if "seconds" in options else {"num_requests": 10}
    values: dict[str, Any] = {"num_clients": 2, "num_adapters": 4, **length, **options}
    return Workload(popularity=Popularity.parse(popularity), **values)


@pytest.mark.parametrize("text", ["uniform", "one", "base", "zipf:1.1"])
def test_popularity_reads_what_it_writes(text: str) -> None:
    assert str(Popularity.parse(text)) == text


@pytest.mark.parametrize("text", ["", "zipf", "zipf:0", "zipf:x", "zipf:nan", "uniform:1", "all"])
def test_popularity_refuses(text: str) -> None:
    with pytest.raises(InvalidWorkload, match=f"popularity '{text}'"):
        Popularity.parse(text)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"temperature": -1}, "temperature must lie"),
        ({"temperature": 1, "top_p": 0}, "top_p must be above 0"),
        ({"temperature": 1, "top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.5}, "need a temperature"),
        ({"top_k": 5}, "need a temperature"),
    ],
)
def test_sampling_refuses(values: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidWorkload, match=text):
        Sampling(**values)


def test_every_request_says_how_its_tokens_are_chosen() -> None:
    sampling = Sampling(temperature=0.7, top_p=0.9)
    workload = _workload(sampling=sampling)
    asked = [*islice(requests(workload, _prompts()), 3), *warm_up_requests(workload, _prompts())]
    assert {request.sampling for request in asked} == {sampling}


def test_weights() -> None:
    assert Popularity.parse("uniform").weights(3) == [1, 1, 1]
    assert Popularity.parse("zipf:1").weights(3) == pytest.approx([1, 1 / 2, 1 / 3])
    assert Popularity.parse("one").weights(3) == [1, 0, 0]
    assert Popularity.parse("base").weights(3) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clients": 0}, "num_clients must be at least 1"),
        ({"num_output_tokens": 0}, "num_output_tokens must be at least 1"),
        ({"num_adapters": 0}, "popularity uniform needs at least one adapter"),
        ({"num_requests": 0}, "num_requests must be at least 1"),
        ({"num_requests": None}, "give a number of requests, a number of seconds, or both"),
        ({"seconds": 0.0}, "seconds must be above 0"),
    ],
)
def test_workload_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidWorkload, match=message):
        _workload(**options)


def test_prompts_have_the_exact_length_and_differ() -> None:
    tokenizer = _WordTokenizer(["alpha", "beta", "gamma", "delta"])
    prompts = PromptMaker(tokenizer, 40)
    texts = [prompts.make(random.Random(seed)) for seed in range(5)]
    assert [len(tokenizer.encode(text)) for text in texts] == [40] * 5
    assert len(set(texts)) == 5


def test_a_prompt_has_room_for_a_word() -> None:
    with pytest.raises(InvalidWorkload, match="num_prompt_tokens=1 leaves no room"):
        _prompts(1)


def test_a_vocabulary_without_words_is_refused() -> None:
    with pytest.raises(InvalidWorkload, match="no words of one token"):
        PromptMaker(_WordTokenizer(["X", "1"]), 8)


def test_requests_repeat_for_a_seed_and_follow_the_popularity() -> None:
    workload, prompts = _workload("zipf:1", num_adapters=3), _prompts()
    drawn = list(islice(requests(workload, prompts), 2000))
    assert drawn[:50] == list(islice(requests(workload, prompts), 50))
    counts = Counter(request.adapter for request in drawn)
    # Shares 6/11, 3/11, 2/11; 2000 draws are within 5 points of them.
    assert [counts[i] / 2000 for i in range(3)] == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.05)


def test_base_asks_for_no_adapter() -> None:
    assert {r.adapter for r in islice(requests(_workload("base"), _prompts()), 20)} == {None}


def test_warm_up_touches_every_adapter_and_every_client() -> None:
    few = warm_up_requests(_workload(num_clients=1), _prompts())
    assert [request.adapter for request in few] == [0, 1, 2, 3]
    many = warm_up_requests(_workload("one", num_clients=6), _prompts())
    assert [request.adapter for request in many] == [0] * 6
