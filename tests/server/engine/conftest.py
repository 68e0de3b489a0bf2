"""Every kind of plain LoRA on the tiny base, and PEFT with all of them loaded."""

from pathlib import Path

import pytest
from peft import PeftModel

from tests.support.adapters import load_with_peft, make_adapter
from tests.support.engines import ADAPTER_KINDS
from tests.support.models import tiny_llama


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    base = tiny_llama()
    return {name: make_adapter(root / name, base, **kind) for name, kind in ADAPTER_KINDS.items()}


@pytest.fixture(scope="module")
def oracle(folders: dict[str, Path]) -> PeftModel:
    return load_with_peft(tiny_llama(), {name.replace(" ", "_"): p for name, p in folders.items()})
