"""What a training run leaves behind: PEFT's two files in fp16, task card and chat template."""

import json
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save

from dynamic_lora_adapters.files.card import CARD_FILE, TaskCard
from dynamic_lora_adapters.files.chat import TEMPLATE_FILE
from dynamic_lora_server.training.config import TrainingConfig
from dynamic_lora_server.training.errors import TrainingError

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
FILES = frozenset({WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, TEMPLATE_FILE})


def adapter_files(
    model: PeftModel, config: TrainingConfig, chat_template: str | None
) -> dict[str, bytes]:
    """The files of the adapter, by name.

    Raises TrainingError where a factor has become too large for fp16.
    """
    chat = {} if chat_template is None else {TEMPLATE_FILE: chat_template.encode()}
    return {
        **chat,
        WEIGHTS_FILE: save(_factors(model), metadata={"format": "pt"}),
        CONFIG_FILE: _as_json(_peft_config(model, config)),
        CARD_FILE: _as_json(build_card(config).model_dump(exclude_none=True)),
    }


def build_card(config: TrainingConfig) -> TaskCard:
    """The task card of a recipe. `metrics` is empty until a run through the server fills it."""
    card = config.card
    return TaskCard(
        description=card.description,
        prompt_template=config.prompt_template,
        parameters=card.parameters,
        example=card.example,
        base_model=config.base_name,
        dataset=card.dataset,
        license=card.license,
        attribution=card.attribution,
    )


def _factors(model: PeftModel) -> dict[str, torch.Tensor]:
    # False: the base's embeddings are frozen, and "auto" asks the hub about them.
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    half = {name: tensor.to("cpu", torch.float16) for name, tensor in sorted(tensors.items())}
    for name, tensor in half.items():
        if not tensor.isfinite().all():
            raise TrainingError(
                f"training diverged: {name} holds values that fp16 cannot; lower optimizer.lr"
            )
    return half


def _peft_config(model: PeftModel, config: TrainingConfig) -> dict[str, Any]:
    saved = {
        **model.peft_config["default"].to_dict(),
        "base_model_name_or_path": config.base_name,
        "inference_mode": True,
    }
    # PEFT keeps sets, whose order changes from run to run.
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in sorted(saved.items())
    }


def _as_json(content: dict[str, Any]) -> bytes:
    return f"{json.dumps(content, indent=2, ensure_ascii=False)}\n".encode()
