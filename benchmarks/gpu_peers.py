"""PEFT's `generate` and transformers' `generate_batch` on models of random weights."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.gpu_engine import PROMPT_TOKENS
from benchmarks.gpu_shapes import RANK, ModelShape

NUM_ADAPTERS = 8


def measure_peers(
    shape: ModelShape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    rows: tuple[int, ...],
    num_tokens: int,
    out_of_time: Callable[[], bool],
) -> list[dict[str, Any]]:
    """Output tokens per second of whole generations, the prompt included; base, then 8 adapters.

    What fails or finds no time is left out by name.
    """
    model: Any = shape.build(device, dtype)
    vocab = int(model.config.vocab_size)
    found: list[dict[str, Any]] = []

    def measure(peer: str, count: int, run: Callable[[torch.Tensor], object]) -> None:
        ids = torch.randint(3, vocab, (count, PROMPT_TOKENS), device=device)
        cell: dict[str, Any] = {"peer": peer, "rows": count}
        found.append(cell)
        if out_of_time():
            cell["left_out"] = "out of time"
            return
        try:
            run(ids)  # compiles, allocates
            seconds = _seconds(lambda: run(ids), device)
            cell["tokens_per_s"] = round(count * num_tokens / seconds, 1)
        except Exception as error:  # a peer that cannot run here must not end the measurement
            cell["left_out"] = f"{type(error).__name__}: {error}"[:300]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for count in rows:
            measure("transformers generate", count, lambda ids: _generate(model, ids, num_tokens))
        for count in rows:
            measure("generate_batch", count, lambda ids: _batch(model, ids.tolist(), num_tokens))
        adapted = _with_adapters(model)
        for count in rows:
            measure("PEFT generate, 8 mixed", count, lambda ids: _mixed(adapted, ids, num_tokens))
    return found


def _with_adapters(model: Any) -> Any:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, target_modules="all-linear", init_lora_weights=False
    )
    adapted = get_peft_model(model, config, adapter_name="a0")
    for number in range(1, NUM_ADAPTERS):
        adapted.add_adapter(f"a{number}", config)
    return adapted.eval()


def _generate(model: Any, ids: torch.Tensor, num_tokens: int, **arguments: Any) -> None:
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        **arguments,
    )


def _mixed(model: Any, ids: torch.Tensor, num_tokens: int) -> None:
    names = [f"a{row % NUM_ADAPTERS}" for row in range(len(ids))]
    _generate(model, ids, num_tokens, adapter_names=names)


def _batch(model: Any, prompts: list[list[int]], num_tokens: int) -> None:
    # No end of sequence: every row gets all its tokens.
    config = GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    # On a CPU the cache would fill most of the memory there is.
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    answers = model.generate_batch(
        inputs=prompts,
        generation_config=config,
        continuous_batching_config=small if model.device.type == "cpu" else None,
    )
    lengths = {len(answer.generated_tokens) for answer in answers.values()}
    if lengths != {num_tokens} or len(answers) != len(prompts):
        raise RuntimeError(f"{len(answers)} answers of {sorted(lengths)} tokens")


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
