"""Random adapters, made by PEFT; the peers share some of rank 16 on every linear layer."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# Small beside the base's outputs, and far from zero: the delta changes what is generated.
_B_STD = 0.02


def make_adapters(
    base: Path,
    folder: Path,
    *,
    num_adapters: int,
    rank: int = 16,
    target_modules: str | Sequence[str] = "all-linear",
    seed: int = 0,
) -> list[Path]:
    """Write `num_adapters` PEFT folders `bench-<i>` under `folder` and return them in order.

    The same base, rank, modules and seed give the same weights.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    modules = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, task_type="CAUSAL_LM")
    names = [f"bench-{index}" for index in range(num_adapters)]
    if not names:
        return []
    peft_model = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        peft_model.add_adapter(name, config)
    for index, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed + index)
        for key, parameter in peft_model.named_parameters():
            if f"lora_A.{name}." in key:
                std = parameter.shape[1] ** -0.5
            elif f"lora_B.{name}." in key:
                std = _B_STD
            else:
                continue
            parameter.data.normal_(0.0, std, generator=generator)
    peft_model.save_pretrained(str(folder), selected_adapters=names)
    return [folder / name for name in names]


def halved(file: Path) -> bytes:
    """A safetensors file with its tensors in float16."""
    import torch
    from safetensors.torch import load_file, save

    tensors = {name: tensor.to(torch.float16) for name, tensor in load_file(file).items()}
    content: bytes = save(tensors)
    return content


def with_other_values(file: bytes, seed: int) -> bytes:
    """A float16 safetensors file whose first `lora_B` has other random values.

    Much cheaper than another adapter, and other content all the same.
    """
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    entry = header[min(name for name in header if "lora_B" in name)]
    begin, end = (start + int(offset) for offset in entry["data_offsets"])
    values = np.random.default_rng(seed).normal(0.0, _B_STD, (end - begin) // 2)
    return file[:begin] + values.astype("<f2").tobytes() + file[end:]
