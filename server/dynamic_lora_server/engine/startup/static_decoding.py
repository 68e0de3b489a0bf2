"""Setting up decoding in steps of fixed shape: whether it can be had, checked and captured."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from dynamic_lora_adapters.apply.widening import model_dtype
from dynamic_lora_adapters.device.groups import ProjectionGroup
from dynamic_lora_adapters.device.tables import AddressTables
from dynamic_lora_adapters.kernels import has_triton
from dynamic_lora_adapters.transfer import check_alive
from dynamic_lora_server.engine.attention.paged import (
    LARGEST_HEAD,
    PAGE_SIZE,
    PagedKernel,
    PagedTables,
    paged_kernel_available,
    triton_pages_available,
)
from dynamic_lora_server.engine.graphs.compiled_layers import CompiledLayers
from dynamic_lora_server.engine.graphs.decode_graphs import DecodeGraphs
from dynamic_lora_server.engine.graphs.static_attention import GatheredPages, StaticKernel
from dynamic_lora_server.engine.graphs.static_step import (
    Row,
    StaticBuffers,
    StaticShape,
    StaticStep,
)
from dynamic_lora_server.engine.kv.space import Allocation
from dynamic_lora_server.engine.model_runner import ModelRunner
from dynamic_lora_server.engine.probe import TOLERANCE, random_tokens
from dynamic_lora_server.errors import InvalidParameter, UnsupportedModel

logger = logging.getLogger(__name__)

# Rows that compiled layers are tried with, besides one and the most. As many as nothing else of
# a model is, as heads or layers: torch takes equal sizes for one and the same.
_SOME_ROWS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticWish:
    """What is asked for.

    `graphs` None means where they can be captured; True runs the same steps uncaptured
    elsewhere. With `compiled`, torch compiles the decoder layers, and where it cannot
    there is no engine. `max_rows` decode together, over `num_cells` cells of the KV
    cache, each seeing up to `window` tokens.
    """

    graphs: bool | None
    compiled: bool
    max_rows: int
    num_cells: int
    window: int


def static_decoding(
    runner: ModelRunner,
    groups: Sequence[ProjectionGroup],
    wish: StaticWish,
    on_step: Callable[[str], object],
) -> DecodeGraphs | None:
    """Steps of fixed shape for the runner's model, captured where it is on CUDA.

    None where they cannot be had; the log says why. Raises InvalidParameter if compiled
    layers are asked for there, UnsupportedModel if the model's cannot be compiled or
    give other logits, torch.AcceleratorError where nothing runs on the device any more.
    """
    model = runner.model
    obstacle = _obstacle(runner, wish)
    if obstacle is not None:
        if wish.compiled:
            raise InvalidParameter(
                f"compile is for decoding in CUDA graphs, and there are none: {obstacle}.",
                field="compile",
                fix="Leave the option out.",
            )
        logger.info("No CUDA graphs: %s", obstacle)
        return None
    step = _static_step(runner, groups, wish)
    graphs = DecodeGraphs(step, deltas=has_triton(model.device))
    try:
        if wish.compiled:
            on_step("Compiling the decoder layers")
            _compile(step, model)
        if model.device.type == "cuda":
            graphs.capture(lambda done, total: on_step(f"Capturing CUDA graphs ({done}/{total})"))
    except Exception as error:  # compilers fail in as many ways as they have passes
        check_alive(model.device)
        if wish.compiled:
            raise _refusal(model, error) from error
        logger.warning("Decoding runs without CUDA graphs: %s", error)
        return None
    return graphs


def graphs_obstacle(
    device: torch.device, dtype: torch.dtype, head_dim: int = LARGEST_HEAD
) -> str | None:
    """Why decoding cannot be captured on a device, or None if it can be tried."""
    if device.type != "cuda":
        return "there is no CUDA device"
    if static_kernel(device, dtype, head_dim) is GatheredPages:
        return f"neither torch's paged attention nor Triton attends to pages of {dtype} here"
    return None


def static_kernel(
    device: torch.device, dtype: torch.dtype, head_dim: int = LARGEST_HEAD
) -> Callable[[PagedTables], StaticKernel]:
    """What attends to pages in steps of fixed shape: torch's kernel, ours in Triton, or neither.

    Torch's takes 16 bits alone, and not every release has one.
    """
    if dtype in (torch.float16, torch.bfloat16) and paged_kernel_available(device, head_dim):
        return PagedKernel
    if device.type == "cuda" and triton_pages_available(device, dtype):
        from dynamic_lora_server.engine.attention.paged_triton import TritonPages

        return TritonPages
    return GatheredPages


def _obstacle(runner: ModelRunner, wish: StaticWish) -> str | None:
    if wish.graphs is False:
        return "they are switched off"
    obstacle = None
    if wish.graphs is None:
        model = runner.model
        obstacle = graphs_obstacle(model.device, model_dtype(model), runner.head_dim)
    return obstacle or (None if runner.paged else "the KV cache has no pages")


def _static_step(
    runner: ModelRunner, groups: Sequence[ProjectionGroup], wish: StaticWish
) -> StaticStep:
    model = runner.model
    head = next((group for group in groups if group.is_head), None)
    shape = StaticShape(
        max_rows=wish.max_rows,
        max_pages=-(-wish.window // PAGE_SIZE),
        page_size=PAGE_SIZE,
        scratch_cell=wish.num_cells,
        vocab_size=int(model.config.vocab_size) if head is None else head.out_features,
    )
    return StaticStep(
        model,
        runner.site,
        runner.cache,
        StaticBuffers(shape, model.device),
        AddressTables(groups, shape.max_rows, model.device),
        static_kernel(model.device, model_dtype(model), runner.head_dim),
    )


def _refusal(model: PreTrainedModel, error: Exception) -> UnsupportedModel:
    """An error that says what stands in the way of compiled layers."""
    # The pass, and what it said; behind that, pages of code.
    reason = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
    return UnsupportedModel(
        f"{type(model).__name__} cannot decode with compiled layers: {reason}",
        fix="Start without --compile.",
    )


def _compile(step: StaticStep, model: PreTrainedModel) -> None:
    """Have the step run compiled layers, once they have given the logits of the model's own.

    Tried with one row, with some, and with as many as can be: nothing is compiled later.
    """
    most = min(step.buffers.shape.max_rows, step.buffers.shape.page_size)
    sizes = sorted({1, min(_SOME_ROWS, most), most})
    expected = [_trial(step, model, size) for size in sizes]
    step.layers = CompiledLayers(model)
    for size, logits in zip(sizes, expected, strict=True):
        difference = (_trial(step, model, size) - logits).abs().max() / logits.abs().max()
        if not difference <= TOLERANCE[model_dtype(model)]:
            raise UnsupportedModel(
                f"the logits of {size} rows are others (relative difference {difference:.1e})"
            )


def _trial(step: StaticStep, model: PreTrainedModel, num_rows: int) -> torch.Tensor:
    """Logits [num_rows, vocab] of one sequence of so many tokens, on the page of the padding."""
    shape = step.buffers.shape
    scratch = Allocation((shape.scratch_cell,), shape.page_size, shape.page_size)
    tokens = random_tokens(model, num_rows).tolist()
    rows = [Row(token, position, scratch, None) for position, token in enumerate(tokens)]
    step.buffers.fill(rows, [None] * num_rows)
    step.run(num_rows, deltas=False)
    return step.buffers.logits[:num_rows].clone()
