"""PEFT's `generate` and transformers' `generate_batch` on models of random weights."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from benchmarks.gpu_engine import PROMPT_TOKENS
from benchmarks.gpu_shapes import RANK, ModelShape

NUM_ADAPTERS = 8

_REPEATS = 3

Run = Callable[[torch.Tensor, int], object]
"""Generates so many tokens for token ids [rows, PROMPT_TOKENS]."""


def measure_peers(
    shape: ModelShape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    rows: tuple[int, ...],
    num_tokens: int,
    out_of_time: Callable[[], bool],
) -> list[dict[str, Any]]:
    """Output tokens per second, base, then 8 adapters; medians of three.

    `tokens_per_s` is of whole generations, the prompt included. `decode_tokens_per_s` is what to
    hold against steps of the engine: of all tokens but the first, over the time that they add to
    generations of one token.
    What fails or finds no time is left out by name. What is set up once for many requests is
    not in the time. `attention` is transformers' name of what attends.
    """
    model: Any = shape.build(device, dtype)
    vocab = int(model.config.vocab_size)
    found: list[dict[str, Any]] = []

    def measure(peer: str, count: int, running: AbstractContextManager[Run]) -> None:
        ids = torch.randint(3, vocab, (count, PROMPT_TOKENS), device=device)
        cell: dict[str, Any] = {"peer": peer, "rows": count}
        found.append(cell)
        if out_of_time():
            cell["left_out"] = "out of time"
            return
        try:
            with running as run:
                run(ids, num_tokens)  # compiles, allocates
                cell["attention"] = model.config._attn_implementation
                whole = _seconds(lambda: run(ids, num_tokens), device)
                first = _seconds(lambda: run(ids, 1), device)
            cell["tokens_per_s"] = round(count * num_tokens / whole, 1)
            if whole > first:
                decoded = count * (num_tokens - 1)
                cell["decode_tokens_per_s"] = round(decoded / (whole - first), 1)
        except Exception as error:  # a peer that cannot run here must not end the measurement
            cell["left_out"] = f"{type(error).__name__}: {error}"[:300]

    with warnings.catch_warnings(), _torch_s_attention(device):
        warnings.simplefilter("ignore")
        for count in rows:
            base = nullcontext(lambda ids, tokens: _generate(model, ids, tokens))
            measure("transformers generate", count, base)
        for count in rows:
            measure("generate_batch", count, _batching(model, count, num_tokens))
        adapted = cache(lambda: _with_adapters(model))
        for count in rows:
            mixed = nullcontext(lambda ids, tokens: _mixed(adapted(), ids, tokens))
            measure("PEFT generate, 8 mixed", count, mixed)
    return found


@contextmanager
def _torch_s_attention(device: torch.device) -> Iterator[None]:
    """torch's own choice among its kernels, from which an engine before may have taken one."""
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def _with_adapters(model: Any) -> Any:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, target_modules="all-linear", init_lora_weights=False
    )
    # Left to itself PEFT keeps factors in float32, as training wants them.
    adapted = get_peft_model(model, config, adapter_name="a0", autocast_adapter_dtype=False)
    for number in range(1, NUM_ADAPTERS):
        adapted.add_adapter(f"a{number}", config, autocast_adapter_dtype=False)
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


@contextmanager
def _batching(model: Any, count: int, num_tokens: int) -> Iterator[Run]:
    """What `generate_batch` does with a manager that stays: its cache and graphs are made once."""
    # No end of sequence: every row gets all its tokens.
    config = GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    # On a CPU the cache would fill most of the memory there is.
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    with model.continuous_batching_context_manager(
        generation_config=config,
        continuous_batching_config=small if model.device.type == "cpu" else None,
        workload_hints=WorkloadHints(
            max_prompt_length=PROMPT_TOKENS, max_generated_length=num_tokens, num_requests=count
        ),
        warmup=True,
        timeout=5,
    ) as manager:
        yield lambda ids, tokens: _answer(manager, ids.tolist(), tokens)


def _answer(manager: Any, prompts: list[list[int]], num_tokens: int) -> None:
    manager.add_requests(inputs=prompts, max_new_tokens=num_tokens)
    lengths: list[int] = []
    while len(lengths) < len(prompts):
        answer = manager.get_result(timeout=1)
        if answer is None:
            if not manager.is_running():
                raise RuntimeError("its thread has ended")
        elif answer.error is not None:
            raise RuntimeError(answer.error)
        elif answer.is_finished():
            lengths.append(len(answer.generated_tokens))
    if set(lengths) != {num_tokens}:
        raise RuntimeError(f"answers of {sorted(set(lengths))} tokens")


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    return statistics.median(_once(run, device) for _ in range(_REPEATS))


def _once(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
