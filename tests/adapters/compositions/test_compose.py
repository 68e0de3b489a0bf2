"""Composed terms against weighted sums of dense matrices, and against PEFT."""

import zlib
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft.utils import merge_utils

from dynamic_lora_adapters.compositions import compose as module
from dynamic_lora_adapters.compositions.compose import compose, merge
from dynamic_lora_adapters.compositions.composition import Merge, SignMethod, Strategy
from dynamic_lora_adapters.errors import AdapterCapacityError, UnsupportedAdapter
from dynamic_lora_adapters.terms import (
    AdapterTerms,
    EmbeddingTerms,
    LinearTerms,
    ModuleOverride,
    PromptTerms,
)

OUT, IN, VOCAB = 6, 5, 9
WEIGHTS = (0.7, -1.5, 2.0)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(rank: int, seed: int, **more: torch.Tensor) -> LinearTerms:
    a, b = draw(rank, IN, seed=seed), draw(OUT, rank, seed=seed + 50)
    return LinearTerms(a=a, b=b, rank=rank, scaling=2.0, **more)


def delta(terms: LinearTerms | None) -> torch.Tensor:
    total = torch.zeros(OUT, IN)
    if terms is None:
        return total
    if terms.a is not None and terms.b is not None:
        total = total + terms.b @ terms.a
    return total if terms.dense is None else total + terms.dense


def of(linears: Mapping[str, LinearTerms]) -> AdapterTerms:
    return AdapterTerms(linears=linears)


ADAPTERS = [
    of({"q": linear(2, 1), "v": linear(3, 2)}),
    of({"q": linear(4, 3, bias=draw(OUT, seed=9)), "k": linear(1, 4)}),
    of({"q": LinearTerms(dense=draw(OUT, IN, seed=5), scale=draw(OUT, seed=6)), "v": linear(8, 7)}),
]


def test_a_sum_is_the_sum_of_the_deltas() -> None:
    composed = compose(list(zip(ADAPTERS, WEIGHTS, strict=True)))
    assert set(composed.linears) == {"q", "k", "v"}
    for path, terms in composed.linears.items():
        expected = sum(
            (
                w * delta(adapter.linears.get(path))
                for adapter, w in zip(ADAPTERS, WEIGHTS, strict=True)
            ),
            torch.zeros(OUT, IN),
        )
        torch.testing.assert_close(delta(terms), expected)
    query = composed.linears["q"]
    assert query.bias is not None and query.scale is not None
    torch.testing.assert_close(query.bias, WEIGHTS[1] * draw(OUT, seed=9))
    torch.testing.assert_close(query.scale, WEIGHTS[2] * draw(OUT, seed=6))
    assert query.rank == 6
    assert composed.linears["v"].rank == 11


def test_parts_are_left_as_they_were() -> None:
    before = ADAPTERS[2].linears["q"].dense
    assert before is not None
    copy = before.clone()
    compose([(ADAPTERS[2], 3.0), (ADAPTERS[2], 3.0)])
    assert torch.equal(before, copy)


def test_embeddings_are_summed_by_token() -> None:
    def table(terms: EmbeddingTerms) -> torch.Tensor:
        total = torch.zeros(VOCAB, IN)
        if terms.a is not None and terms.b is not None:
            total += (terms.b @ terms.a).T
        if terms.token_ids is not None and terms.rows is not None:
            assert len(set(terms.token_ids.tolist())) == len(terms.token_ids)
            total[terms.token_ids] += terms.rows
        return total

    own = [
        EmbeddingTerms(token_ids=torch.tensor([3, 1]), rows=draw(2, IN, seed=1)),
        EmbeddingTerms(
            a=draw(2, VOCAB, seed=2),
            b=draw(IN, 2, seed=3),
            token_ids=torch.tensor([1, 8]),
            rows=draw(2, IN, seed=4),
        ),
    ]
    parts = [
        (AdapterTerms(embeddings={"e": terms}), w)
        for terms, w in zip(own, (2.0, -0.5), strict=True)
    ]
    composed = compose(parts).embeddings["e"]
    torch.testing.assert_close(table(composed), 2.0 * table(own[0]) - 0.5 * table(own[1]))


UNSUMMED = [
    (
        AdapterTerms(overrides={"norm": ModuleOverride(parameters={"weight": torch.ones(1)})}),
        "replaces whole modules of the base model",
    ),
    (AdapterTerms(prompt=PromptTerms(num_tokens=1)), "is a prompt of virtual tokens"),
    (AdapterTerms(invocation_ids=(1, 2)), "acts only from its invocation tokens on"),
]


@pytest.mark.parametrize(("terms", "text"), UNSUMMED)
def test_what_is_no_sum_is_refused_by_name_and_passes_alone(terms: AdapterTerms, text: str) -> None:
    assert compose([(terms, 1.0)]) is terms
    for parts in ([(ADAPTERS[0], 1.0), (terms, 1.0)], [(ADAPTERS[0], 0.5), (terms, 0.5)]):
        with pytest.raises(UnsupportedAdapter, match=f"'odd' {text}, and so has no weighted sum"):
            compose(parts, names=["ner", "odd"])
    with pytest.raises(UnsupportedAdapter, match=text) as caught:
        compose([(terms, 2.0)], names=["odd"])
    assert caught.value.fix == "Use it alone, with weight 1."


LOW_RANK = [of({"q": linear(2, 1)}), of({"q": linear(4, 3), "k": linear(1, 4)})]


@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("sign_method", list(SignMethod))
def test_ties_is_pefts(density: float, sign_method: SignMethod) -> None:
    how = Merge(strategy=Strategy.TIES, density=density, sign_method=sign_method)
    merged = merge(list(zip(LOW_RANK, (0.7, -0.4), strict=True)), how)
    deltas = [delta(adapter.linears["q"]) for adapter in LOW_RANK]
    with pytest.warns(UserWarning, match="density") if density == 1 else nullcontext():
        expected = merge_utils.ties(deltas, torch.tensor([0.7, -0.4]), density, sign_method.value)
    torch.testing.assert_close(delta(merged.linears["q"]), expected)


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_magnitude_prune_is_pefts_and_takes_each_layer_alone(density: float) -> None:
    how = Merge(strategy=Strategy.MAGNITUDE_PRUNE, density=density)
    merged = merge(list(zip(LOW_RANK, (0.7, -0.4), strict=True)), how)
    for path, weights, own in (("q", [0.7, -0.4], LOW_RANK), ("k", [-0.4], LOW_RANK[1:])):
        deltas = [delta(adapter.linears[path]) for adapter in own]
        with pytest.warns(UserWarning, match="density") if density == 1 else nullcontext():
            expected = merge_utils.magnitude_prune(deltas, torch.tensor(weights), density)
        torch.testing.assert_close(delta(merged.linears[path]), expected)


@pytest.mark.parametrize("strategy", [Strategy.DARE_LINEAR, Strategy.DARE_TIES])
def test_dare_always_draws_the_same_and_leaves_the_generator_alone(strategy: Strategy) -> None:
    how = Merge(strategy=strategy, density=0.5)
    parts = list(zip(LOW_RANK, (0.7, -0.4), strict=True))
    torch.manual_seed(1)
    first = merge(parts, how)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    second = merge(parts, how)
    assert torch.equal(delta(first.linears["q"]), delta(second.linears["q"]))
    single = merge([(LOW_RANK[0], 1.0)], how).linears["q"]
    kept = delta(single) != 0
    assert 0 < int(kept.sum()) < OUT * IN
    torch.testing.assert_close(delta(single)[kept], 2 * delta(LOW_RANK[0].linears["q"])[kept])


@pytest.mark.parametrize("strategy", [Strategy.DARE_LINEAR, Strategy.DARE_TIES])
def test_dare_is_pefts(strategy: Strategy) -> None:
    how = Merge(strategy=strategy, density=0.5)
    merged = merge(list(zip(LOW_RANK, (0.7, -0.4), strict=True)), how)
    deltas = [delta(adapter.linears["q"]) for adapter in LOW_RANK]
    of_peft = {
        Strategy.DARE_LINEAR: merge_utils.dare_linear,
        Strategy.DARE_TIES: merge_utils.dare_ties,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(b"q"))
        expected = of_peft[strategy](deltas, torch.tensor([0.7, -0.4]), 0.5)
    assert torch.equal(delta(merged.linears["q"]), expected)


def test_dare_draws_the_same_while_others_use_the_global_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As PEFT does on other threads, which read adapters."""
    how, parts = Merge(strategy=Strategy.DARE_TIES, density=0.5), [(LOW_RANK[0], 1.0)]
    expected = delta(merge(parts, how).linears["q"])
    full_like = torch.full_like

    def disturbed(*args: Any, **more: Any) -> torch.Tensor:
        torch.rand(3)
        return full_like(*args, **more)

    monkeypatch.setattr(torch, "full_like", disturbed)
    assert torch.equal(delta(merge(parts, how).linears["q"]), expected)


def test_the_shapes_of_a_merge_are_checked_before_it_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two layers, each once."""
    how, found = Merge(strategy=Strategy.TIES, density=0.5), list[AdapterTerms]()
    parts = list(zip(LOW_RANK, (0.7, -0.4), strict=True))
    merged = merge(parts, how, check_shapes=found.append)
    shapes = [
        {
            path: tuple(one.dense.shape)
            for path, one in terms.linears.items()
            if one.dense is not None
        }
        for terms in (merged, *found)
    ]
    assert shapes == [dict.fromkeys(merged.linears, (OUT, IN))] * 2
    assert len(merged.linears) == 2

    def refuse(_: AdapterTerms) -> None:
        raise AdapterCapacityError("too large")

    monkeypatch.setattr(module, "_merged", None)
    with pytest.raises(AdapterCapacityError):
        merge(parts, how, check_shapes=refuse)


def test_dare_without_pruning_is_the_sum() -> None:
    parts = list(zip(LOW_RANK, (0.7, -0.4), strict=True))
    merged = merge(parts, Merge(strategy=Strategy.DARE_LINEAR, density=1))
    torch.testing.assert_close(delta(merged.linears["q"]), delta(compose(parts).linears["q"]))


@pytest.mark.parametrize(
    ("odd", "text"),
    [
        (ADAPTERS[1], "'odd' changes biases; ties merges deltas of linear layers alone"),
        (of({"q": LinearTerms(scale=torch.ones(OUT))}), "'odd' changes row scales"),
        (AdapterTerms(embeddings={"e": EmbeddingTerms()}), "'odd' changes embeddings"),
        (AdapterTerms(prompt=PromptTerms(num_tokens=1)), "'odd' is a prompt"),
    ],
)
def test_strategies_refuse_more_than_deltas(odd: AdapterTerms, text: str) -> None:
    with pytest.raises(UnsupportedAdapter, match=text):
        merge(
            [(LOW_RANK[0], 1.0), (odd, 1.0)],
            Merge(strategy=Strategy.TIES, density=0.5),
            names=["ner", "odd"],
        )


@pytest.mark.parametrize("size", [1e37, float("nan")])
def test_a_sum_that_cannot_be_computed_is_refused(size: float) -> None:
    linears = {"layer": LinearTerms(a=torch.ones(2, 4), b=torch.full((3, 2), size))}
    terms = AdapterTerms(linears=linears)
    with pytest.raises(UnsupportedAdapter, match=r"values on 'layer' that are too large"):
        compose([(terms, 100.0), (terms, 1.0)])
