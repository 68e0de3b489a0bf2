"""Random adapters that all peers share: rank 16 on every linear layer, made by PEFT."""

from pathlib import Path

# Small beside the base's outputs, and far from zero: the delta changes what is generated.
_B_STD = 0.02


def make_adapters(
    base: Path, folder: Path, *, num_adapters: int, rank: int = 16, seed: int = 0
) -> list[Path]:
    """Write `num_adapters` PEFT folders `bench-<i>` under `folder` and return them in order.

    The same base, rank and seed give the same weights.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
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
