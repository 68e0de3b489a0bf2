"""The files of an adapter hold what was trained."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from dynamic_lora_server.training import TrainingConfig
from dynamic_lora_server.training.artifacts import adapter_files
from dynamic_lora_server.training.output import write_output
from dynamic_lora_server.training.trainer import attach_lora
from tests.server.training.test_config import recipe
from tests.support.models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def test_the_saved_adapter_is_the_trained_one(tmp_path: Path) -> None:
    settings = TrainingConfig.model_validate(recipe())
    trained = attach_lora(tiny_llama(), settings.lora)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    write_output(tmp_path / "out", adapter_files(trained, settings, None))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out"))
    ids = torch.tensor([[5, 9, 40, 77]])
    with torch.no_grad():
        expected, found = trained(ids).logits, loaded(ids).logits
        plain = tiny_llama()(ids).logits
    # fp16 keeps about three digits of each factor.
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    assert (expected - plain).abs().max() > 0.5
