from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from dynamic_lora_adapters import BaseGeometry
from tests.support.adapters import ALL_TARGETS, make_adapter
from tests.support.models import tiny_llama
from tests.support.uploads import copy_adapter


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="session")
def geometry(model: LlamaForCausalLM) -> BaseGeometry:
    return BaseGeometry.of(model, model_id="org/Tiny-Llama")


@pytest.fixture(scope="session")
def _pristine(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    return make_adapter(folder, model, targets=ALL_TARGETS, base_model="org/Tiny-Llama")


@pytest.fixture
def adapter(_pristine: Path, tmp_path: Path) -> Path:
    """A sound adapter on all linear layers, rank 4, alpha 8; the test's own copy."""
    return copy_adapter(_pristine, tmp_path / "adapter")
