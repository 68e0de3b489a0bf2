"""A base in the W8A8 format of `compressed-tensors`, which vLLM reads and multiplies in int8.

Weights of linear layers are symmetric int8 with one scale for each output channel. Their inputs
are quantised by vLLM as it goes, with one scale for each token. Embeddings, the head and norms stay
as they are: vLLM has no int8 product for a head that is tied to the embedding.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.errors import PeerUnavailable

_LARGEST = 127
_LINEAR = "_proj.weight"
_KEPT = ("model.embed_tokens.weight", "lm_head.weight")
_QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def convert(source: Path, target: Path) -> None:
    """Write the model folder `source` (safetensors) in W8A8 to the folder `target`, unless done.

    Raises PeerUnavailable for a model that is not laid out as Llama's are.
    """
    if target.is_dir():
        return
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith("model"):
            shutil.copy(file, part)
    save_file(_tensors(source), part / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (part / "config.json").write_text(
        json.dumps(config | {"quantization_config": _QUANTIZATION}, indent=2)
    )
    part.rename(target)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [out, in] and float32 scales [out, 1] whose product is near `weight` [out, in]."""
    exact = weight.float()
    # A row of zeros has the scale 1: any would do but zero.
    largest = exact.abs().amax(dim=1, keepdim=True)
    scales = torch.where(largest > 0, largest / _LARGEST, 1.0)
    return (exact / scales).round().to(torch.int8), scales


def _tensors(source: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                tensor = tensors.get_tensor(name)
                if name.endswith(_LINEAR):
                    scale_name = name.removesuffix(".weight") + ".weight_scale"
                    found[name], found[scale_name] = quantize(tensor)
                elif tensor.dim() == 1 or name in _KEPT:
                    found[name] = tensor
                else:
                    raise PeerUnavailable(
                        f"W8A8 is written for models with Llama's names, and {name} is none of them"
                    )
    if not found:
        raise PeerUnavailable(f"{source} holds no model*.safetensors")
    return found
