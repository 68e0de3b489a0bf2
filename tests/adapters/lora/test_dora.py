import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamic_lora_adapters.lora.dora import dora_embedding, dora_terms
from dynamic_lora_adapters.terms import EmbeddingTerms, LinearTerms
from tests.support.apply_terms import linear_delta


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 1000), st.booleans())
def test_rows_have_the_length_that_was_trained(seed: int, with_dense: bool) -> None:
    weight = random(12, 8, seed=seed)
    magnitude = random(12, seed=seed + 1)
    dense = random(12, 8, seed=seed + 4) if with_dense else None
    plain = LinearTerms(
        a=random(2, 8, seed=seed + 2), b=random(12, 2, seed=seed + 3), dense=dense, rank=2
    )
    direction = weight + linear_delta(plain, weight)
    adapted = weight + linear_delta(dora_terms(plain, weight, magnitude), weight)
    torch.testing.assert_close(adapted.norm(dim=1), magnitude.abs(), rtol=1e-4, atol=1e-5)
    expected = direction / direction.norm(dim=1, keepdim=True) * magnitude[:, None]
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-5)


def test_the_magnitudes_of_the_base_change_nothing() -> None:
    weight = random(12, 8, seed=0)
    plain = LinearTerms(a=random(2, 8, seed=1), b=torch.zeros(12, 2), bias=torch.ones(12), rank=2)
    terms = dora_terms(plain, weight, weight.norm(dim=1))
    torch.testing.assert_close(linear_delta(terms, weight), torch.zeros(12, 8), rtol=0, atol=1e-6)
    assert terms.bias is plain.bias
    assert terms.rank == 2


def test_an_embeddings_columns_have_the_length_that_was_trained() -> None:
    table, magnitude = random(20, 6, seed=0), random(6, seed=1)
    plain = EmbeddingTerms(
        a=random(2, 20, seed=2),
        b=random(6, 2, seed=3),
        token_ids=torch.tensor([4, 9]),
        rows=random(2, 6, seed=4),
    )
    terms = dora_embedding(plain, table, magnitude)
    assert terms.a is not None
    assert terms.b is not None
    assert terms.rows is not None
    adapted = table + (terms.b @ terms.a).T + terms.rows
    torch.testing.assert_close(adapted.norm(dim=0), magnitude.abs(), rtol=1e-4, atol=1e-5)
