import pytest
import torch

from dynamic_lora_adapters.apply.layers import DeltaSite
from dynamic_lora_adapters.apply.row_hooks import RowHooks
from dynamic_lora_adapters.rows import RowSegment, RowTerms
from dynamic_lora_adapters.terms import AdapterTerms, EmbeddingTerms
from tests.support.models import TINY_MODELS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_the_models_factor_on_embeddings_is_rounded_as_the_model_rounds_it(
    dtype: torch.dtype,
) -> None:
    model = TINY_MODELS["gemma3_text"](hidden_size=48)
    model.to(dtype)  # type: ignore[arg-type]
    embedding = model.get_input_embeddings()
    embedding.embed_scale = torch.tensor(48**0.5)
    path = "model.embed_tokens"
    rows = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    delta = EmbeddingTerms(token_ids=torch.tensor([5, 9]), rows=rows)
    terms = RowTerms.of(
        AdapterTerms(embeddings={path: delta}), device=torch.device("cpu"), dtype=dtype
    )
    assert terms is not None
    ids = torch.tensor([[5, 9, 9, 5]])
    plain = embedding(ids)
    site = DeltaSite()
    site.segments = (RowSegment(terms, slice(2, 4), 0),)
    RowHooks(model, site, {}).prepare(site.segments)
    changed = embedding(ids)
    assert changed[0, :2].equal(plain[0, :2])
    added = rows.to(dtype) * torch.tensor(48**0.5, dtype=dtype)
    assert changed[0, 2:].equal(plain[0, 2:] + added[[1, 0]])
