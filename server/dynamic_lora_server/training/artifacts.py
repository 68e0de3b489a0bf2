"""What a training run leaves behind: PEFT's two files in fp16, and the task card."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dynamic_lora_adapters.card import CARD_FILE, TaskCard
from dynamic_lora_server.training.config import TrainingConfig
from dynamic_lora_server.training.errors import TrainingConfigError

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"


def check_output(output: Path) -> None:
    """Find out whether `output` could be written, before the hours that training may take.

    Raises TrainingConfigError.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-"):
            pass
    except OSError as error:
        raise TrainingConfigError(f"the output {output} cannot be written: {error}") from error


def save_adapter(model: PeftModel, config: TrainingConfig, output: Path) -> None:
    """Write the adapter to the folder `output`, replacing one that is there.

    The folder is complete or absent: files are written beside it and moved into place.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        staged = Path(folder) / output.name
        _write_peft(model, config, staged)
        _write_json(staged / CARD_FILE, build_card(config).model_dump(exclude_none=True))
        if output.exists():
            output.rename(Path(folder) / "replaced")
        staged.rename(output)


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


def _write_peft(model: PeftModel, config: TrainingConfig, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as raw:
        # False: the base's embeddings are frozen, and "auto" asks the hub about them.
        model.save_pretrained(raw, save_embedding_layers=False)
        folder.mkdir()
        tensors = load_file(Path(raw) / _WEIGHTS)
        half = {name: tensor.to(torch.float16) for name, tensor in sorted(tensors.items())}
        save_file(half, folder / _WEIGHTS, metadata={"format": "pt"})
        # safetensors makes its files private; an adapter is meant to be shared.
        (folder / _WEIGHTS).chmod(0o644)
        shutil.copyfile(Path(raw) / _CONFIG, folder / _CONFIG)
    adapter = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    adapter["base_model_name_or_path"] = config.base_name
    if isinstance(adapter["target_modules"], list):
        # PEFT keeps a set, whose order changes from run to run.
        adapter["target_modules"].sort()
    _write_json(folder / _CONFIG, adapter)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")
