"""Puts an engine together around a loaded model."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from dynamic_lora_adapters.costs import KernelChooser
from dynamic_lora_adapters.geometry import BaseGeometry
from dynamic_lora_adapters.groups import ProjectionGroup
from dynamic_lora_adapters.inject import head_group, inject, linear_at, observe_groups, weight_of
from dynamic_lora_adapters.merge import Merger
from dynamic_lora_adapters.pristine import PristineWeights, Restore
from dynamic_lora_adapters.products import can_pack, packing_pays
from dynamic_lora_adapters.row_hooks import RowHooks
from dynamic_lora_adapters.slots import AdapterPool
from dynamic_lora_server.engine.engine import Engine
from dynamic_lora_server.engine.kv_cache import KVCache, LayerGeometry
from dynamic_lora_server.engine.kv_space import ContiguousSpace, KVSpace, PagedSpace
from dynamic_lora_server.engine.mode_controller import ModeController
from dynamic_lora_server.engine.model_runner import ModelRunner
from dynamic_lora_server.engine.paged_attention import PAGE_SIZE
from dynamic_lora_server.engine.probe import adopt_attention, trial_run
from dynamic_lora_server.engine.restore import pristine_weights
from dynamic_lora_server.engine.scheduler import Scheduler
from dynamic_lora_server.engine.startup_costs import startup_costs
from dynamic_lora_server.errors import InvalidParameter, UnsupportedModel
from dynamic_lora_server.modes import Mode

logger = logging.getLogger(__name__)

# RoPE kinds whose angles depend on the longest sequence in the batch; up to the
# original window they do not.
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Sizes of an engine; memory in bytes, None for a share of what is free.

    `paged` None means: paged on CUDA, contiguous on a CPU. `pack_weights` None
    packs where that measures faster and memory for the copies is free.
    `costs_file` keeps what is measured at start for the next one. `mode` says
    whether adapters are merged, `restore` how the base comes back; to subtract
    needs `checkpoint`, the folder the model was loaded from.
    """

    max_running: int = 64
    prefill_chunk: int = 512
    adapter_memory: int | None = None
    kv_memory: int | None = None
    paged: bool | None = None
    pack_weights: bool | None = None
    costs_file: Path | None = None
    mode: Mode = Mode.AUTO
    restore: Restore = Restore.COPY
    checkpoint: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """The engine with what its surroundings need to know of it."""

    engine: Engine
    modes: ModeController
    pool: AdapterPool
    weights: PristineWeights
    groups: list[ProjectionGroup]
    geometry: BaseGeometry
    space: KVSpace
    context_length: int


def build_engine(
    model: PreTrainedModel,
    *,
    model_id: str,
    options: EngineOptions,
    on_step: Callable[[str], object] = logger.info,
) -> BuiltEngine:
    """Check the model, wrap its layers, size the caches and measure the kernels.

    `on_step` is told what is being done. Raises UnsupportedModel if the model
    cannot be served exactly.
    """
    on_step("Checking the model")
    _refuse_quantised(model)
    model.requires_grad_(False)
    geometry = BaseGeometry.of(model, model_id=model_id)
    layers = adopt_attention(model)
    groups = _groups(model, geometry)
    packed = _packs(model, groups, options)
    if packed:
        on_step("Packing the weights")
    site, projections = inject(model, groups, packed=packed)
    pristine = pristine_weights(projections, options.restore, options.checkpoint)
    merger = Merger(projections, pristine)
    costs = startup_costs(
        model,
        groups,
        merger,
        merges=options.mode is not Mode.BYPASS,
        cache=options.costs_file,
        on_step=on_step,
    )
    pool = _adapter_pool(model, groups, options)
    context_length = context_window(model.config)
    space = _kv_space(model, layers, options)
    runner = ModelRunner(
        model=model,
        site=site,
        hooks=RowHooks(model, site),
        merger=merger,
        cache=KVCache(layers, num_cells=space.num_cells, device=model.device, dtype=model.dtype),
        chooser=KernelChooser(costs.kernels),
        paged=isinstance(space, PagedSpace),
    )
    scheduler = Scheduler(
        space, max_running=options.max_running, max_step_tokens=options.prefill_chunk
    )
    modes = ModeController(costs.steps, options.mode, merger, pool)
    return BuiltEngine(
        engine=Engine(scheduler, runner, modes),
        modes=modes,
        pool=pool,
        groups=groups,
        weights=PristineWeights(model, projections, pristine),
        geometry=geometry,
        space=space,
        context_length=min(context_length, space.num_cells),
    )


def context_window(config: PreTrainedConfig) -> int:
    """Tokens a sequence may have: the model's window, or less where RoPE demands it."""
    window = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
        original = rope.get("original_max_position_embeddings")
        original = original or getattr(config, "original_max_position_embeddings", None)
        window = min(window, int(original or window))
    return window


def _refuse_quantised(model: PreTrainedModel) -> None:
    """Deltas are added to, and adapters merged into, weights of floating point alone."""
    kind = getattr(model.config, "quantization_config", None)
    odd = next((n for n, p in model.named_parameters() if not p.is_floating_point()), None)
    if kind is not None or odd is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} is quantised ({odd or 'quantization_config'}); adapters "
            "cannot be merged into such weights, and it is not served."
        )


def _groups(model: PreTrainedModel, geometry: BaseGeometry) -> list[ProjectionGroup]:
    head = head_group(model)
    heads = [] if head is None else [head]
    paths = [path for path in geometry.linears if head is None or path not in head.paths]
    return observe_groups(model, paths, trial_run(model)) + heads


def _packs(model: PreTrainedModel, groups: list[ProjectionGroup], options: EngineOptions) -> bool:
    wanted = options.pack_weights
    if wanted is None and options.restore is Restore.SUBTRACT:
        wanted = False  # packed weights leave the parameters as they are: nothing to subtract
    if wanted is False or not any(not group.is_head for group in groups):
        return False
    layers = [group for group in groups if not group.is_head]
    widest = max(layers, key=lambda group: group.widths[0] * group.in_features)
    weight = weight_of(linear_at(model, widest.paths[0]))
    possible = can_pack(weight)
    if wanted and not possible:
        raise InvalidParameter(
            f"weights in {model.dtype} on {model.device} cannot be packed here.",
            field="pack_weights",
            fix="Leave the option out: weights are packed where that is possible and faster.",
        )
    # The copies may take half of what is free; the rest is for the caches.
    fits = 2 * sum(p.nbytes for p in model.parameters()) < _free_memory(model.device)
    return possible and (wanted is True or (fits and packing_pays(weight)))


def _adapter_pool(
    model: PreTrainedModel, groups: list[ProjectionGroup], options: EngineOptions
) -> AdapterPool:
    memory = options.adapter_memory or _share_of_free(model.device, 0.25)
    return AdapterPool(groups, budget_bytes=memory, device=model.device, dtype=model.dtype)


def _kv_space(
    model: PreTrainedModel, layers: list[LayerGeometry], options: EngineOptions
) -> KVSpace:
    per_token = KVCache.bytes_per_token(layers, model.dtype)
    memory = options.kv_memory or _share_of_free(model.device, 0.25)
    # No more than every running sequence at its full window can ever use.
    num_cells = min(memory // per_token, options.max_running * context_window(model.config))
    paged = model.device.type == "cuda" if options.paged is None else options.paged
    if num_cells < (PAGE_SIZE if paged else 1):
        raise InvalidParameter(
            f"kv_memory of {memory} bytes holds {num_cells} tokens of {per_token} bytes each.",
            field="kv_memory",
            fix="Give the KV cache more memory.",
        )
    return PagedSpace(num_cells // PAGE_SIZE, PAGE_SIZE) if paged else ContiguousSpace(num_cells)


def _share_of_free(device: torch.device, share: float) -> int:
    return int(_free_memory(device) * share)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
