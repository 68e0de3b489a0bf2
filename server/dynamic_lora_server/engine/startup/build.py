"""Puts an engine together around a loaded model."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dynamic_lora_adapters.apply.costs import KernelChooser, group_kernels
from dynamic_lora_adapters.apply.inject import (
    head_group,
    inject,
    observe_groups,
)
from dynamic_lora_adapters.apply.merge import Merger
from dynamic_lora_adapters.apply.pristine import PristineWeights, Restore
from dynamic_lora_adapters.apply.products import ProductKind
from dynamic_lora_adapters.apply.row_axes import watching_rows
from dynamic_lora_adapters.apply.row_hooks import RowHooks
from dynamic_lora_adapters.apply.widening import computed_bytes, model_dtype
from dynamic_lora_adapters.device.groups import ProjectionGroup
from dynamic_lora_adapters.device.slots import AdapterPool
from dynamic_lora_adapters.geometry import BaseGeometry, LayerGeometry
from dynamic_lora_adapters.kernels.factor_layout import FactorLayout, layout_for
from dynamic_lora_adapters.native.norm import adopt_native_norms
from dynamic_lora_adapters.native.sampling import native_sampling
from dynamic_lora_server.engine.decoder.native_decoder import adopt_native_layers
from dynamic_lora_server.engine.decoder.rotary import context_window
from dynamic_lora_server.engine.decoder.trial import decode_trial
from dynamic_lora_server.engine.drafting.drafts import MAX_DRAFT, Drafter
from dynamic_lora_server.engine.engine import Engine
from dynamic_lora_server.engine.graphs.decode_graphs import DecodeGraphs
from dynamic_lora_server.engine.kv.layout import KVLayout
from dynamic_lora_server.engine.kv.space import KVSpace, PagedSpace
from dynamic_lora_server.engine.mode_controller import ModeController
from dynamic_lora_server.engine.model_runner import ModelRunner
from dynamic_lora_server.engine.probe import (
    adopt_attention,
    refuse_quantised,
    settle_attention,
    trial_run,
)
from dynamic_lora_server.engine.scheduler import Scheduler
from dynamic_lora_server.engine.startup.costs import startup_costs
from dynamic_lora_server.engine.startup.kv_plan import KVWish, kv_dtype, plan_kv
from dynamic_lora_server.engine.startup.memory import share_of_free
from dynamic_lora_server.engine.startup.mode_costs import settled_mode
from dynamic_lora_server.engine.startup.product_kind import product_kind
from dynamic_lora_server.engine.startup.restore import pristine_weights
from dynamic_lora_server.engine.startup.static_decoding import StaticWish, static_decoding
from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.modes import Mode
from dynamic_lora_server.modes.costs import StepCosts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Sizes of an engine; memory in bytes, None for a share of what is free.

    `prefix_cache_memory` is the part of `kv_memory` that may hold prompt prefixes
    for later prompts, 0 for none. `kv_dtype` None keeps keys and values in the model's
    dtype, or in bfloat16 where `base_product` rounds weights. `paged` None means: paged on
    CUDA, contiguous on a CPU. `decode_graphs` None means: where they can be captured; True runs
    the same steps uncaptured elsewhere. With `compile_layers`, those steps run decoder
    layers that torch has compiled. `overlap` starts a step before the one before is
    read; None means: on CUDA, for elsewhere the host does the step's work itself. Up to
    `speculate` tokens of each decoding sequence are drafted in a step, 0 for none; only on a CPU.
    `base_product` None takes the fastest that there is memory for; without `native`
    nothing runs in the project's own C++.
    `costs_file` keeps what is measured at start for the next one. `mode` says whether adapters are
    merged, and AUTO never does on CUDA or where memory is short; `restore` how the base comes
    back; to subtract needs `checkpoint`, the folder the model was loaded from.
    """

    max_running: int = 64
    prefill_chunk: int = 512
    adapter_memory: int | None = None
    kv_memory: int | None = None
    kv_dtype: torch.dtype | None = None
    prefix_cache_memory: int | None = None
    paged: bool | None = None
    decode_graphs: bool | None = None
    compile_layers: bool = False
    overlap: bool | None = None
    speculate: int = 0
    base_product: ProductKind | None = None
    native: bool = True
    costs_file: Path | None = None
    mode: Mode = Mode.AUTO
    restore: Restore = Restore.COPY
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.speculate <= MAX_DRAFT:
            raise ValueError(f"speculate must lie between 0 and {MAX_DRAFT}")


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
    geometry = BaseGeometry.of(model, model_id=model_id)
    layers = _checked_layers(model, options)
    with watching_rows(model) as rows:
        groups = _groups(model, geometry)
    geometry = replace(geometry, rows=rows, layers=tuple(layers))
    kind = _product_kind(model, groups, options)
    copied = widened = 0  # by merges, and by products before
    if kind is ProductKind.PLAIN and options.restore is Restore.COPY:
        copied = computed_bytes(model)
        widened = copied - sum(parameter.nbytes for parameter in model.parameters())
    mode = settled_mode(options.mode, model.device, copied=copied, widened=widened)
    options = replace(options, mode=mode)
    wish = _kv_wish(model, kind, options)
    dtype = kv_dtype(model, wish)  # refused, if so, before what takes long
    on_step(f"Laying out the weights ({kind} products)")
    site, projections = inject(model, groups, kind=kind)
    pristine = pristine_weights(projections, options.restore, options.checkpoint)
    merger = Merger(projections, pristine)
    plan = plan_kv(layers, wish, model.device, dtype)
    kv, cache = plan.layout, plan.cache(layers, model.device)
    decoder = adopt_native_layers(model, site, projections, cache, wanted=options.native)
    trial = decode_trial(model, cache, decoder)
    chooser, steps = _measured(model, groups, kind, merger, trial, options, on_step)
    pool = _adapter_pool(model, groups, kind, chooser, options)
    runner = ModelRunner(
        model=model,
        site=site,
        hooks=RowHooks(model, site, rows),
        merger=merger,
        cache=cache,
        chooser=chooser,
        paged=isinstance(kv.space, PagedSpace),
        decoder=decoder,
    )
    runner = replace(runner, graphs=_decode_graphs(runner, groups, kv, options, on_step))
    modes = ModeController(steps, options.mode, merger, pool)
    return BuiltEngine(
        engine=_engine(kv, runner, modes, steps, options),
        modes=modes,
        pool=pool,
        groups=groups,
        weights=PristineWeights(model, projections, pristine),
        geometry=geometry,
        space=kv.space,
        context_length=min(context_window(model.config), kv.space.num_cells),
    )


def _measured(
    model: PreTrainedModel,
    groups: list[ProjectionGroup],
    kind: ProductKind,
    merger: Merger,
    trial: Callable[[int], object],
    options: EngineOptions,
    on_step: Callable[[str], object],
) -> tuple[KernelChooser, StepCosts]:
    """What chooses delta kernels, and what steps and switches take."""
    kernels = group_kernels(
        groups,
        device=model.device,
        dtype=model_dtype(model),
        native=options.native,
        factor_dtype=kind.factor_dtype,
    )
    costs = startup_costs(
        groups,
        kernels,
        merger,
        trial,
        device=model.device,
        dtype=model_dtype(model),
        factor_dtype=kind.factor_dtype,
        merges=options.mode is not Mode.BYPASS,
        drafts=options.speculate > 0,
        file=_costs_file(options.costs_file, kind),
        on_step=on_step,
    )
    return KernelChooser(costs.kernels, kernels), costs.steps


def _costs_file(file: Path | None, kind: ProductKind) -> Path | None:
    """Of these products alone, and factors: they may differ from one start to the next."""
    kept_in = "" if kind.factor_dtype is None else f"-{kind.factor_dtype}"
    return None if file is None else file.with_stem(f"{file.stem}-{kind}{kept_in}")


def _checked_layers(model: PreTrainedModel, options: EngineOptions) -> list[LayerGeometry]:
    """The KV geometry of a model's layers, once their attention, and norms, are the engine's."""
    refuse_quantised(model)
    if options.speculate and model.device.type != "cpu":
        raise InvalidParameter(
            "speculate is for models on a CPU: decoding on a GPU runs captured steps of one token "
            "a sequence.",
            field="speculate",
            fix="Leave --speculate out.",
        )
    model.requires_grad_(False)
    settle_attention(model.device)
    layers = adopt_attention(model)
    if options.native:
        adopt_native_norms(model)
    return layers


def _decode_graphs(
    runner: ModelRunner,
    groups: list[ProjectionGroup],
    kv: KVLayout,
    options: EngineOptions,
    on_step: Callable[[str], object],
) -> DecodeGraphs | None:
    wish = StaticWish(
        graphs=options.decode_graphs,
        compiled=options.compile_layers,
        max_rows=options.max_running,
        num_cells=kv.num_cells,
        window=min(context_window(runner.model.config), kv.space.num_cells),
    )
    return static_decoding(runner, groups, wish, on_step)


def _engine(
    kv: KVLayout,
    runner: ModelRunner,
    modes: ModeController,
    steps: StepCosts,
    options: EngineOptions,
) -> Engine:
    scheduler = Scheduler(
        kv.space,
        max_running=options.max_running,
        prefill_chunk=options.prefill_chunk,
        prefixes=kv.prefixes,
        drafter=Drafter(steps, options.speculate) if options.speculate else None,
    )
    on_cuda = runner.model.device.type == "cuda"
    sampling = native_sampling(wanted=options.native and not on_cuda)
    overlap = on_cuda if options.overlap is None else options.overlap
    return Engine(scheduler, runner, modes, sampling, overlap=overlap)


def _groups(model: PreTrainedModel, geometry: BaseGeometry) -> list[ProjectionGroup]:
    head = head_group(model)
    heads = [] if head is None else [head]
    paths = [path for path in geometry.linears if head is None or path not in head.paths]
    return observe_groups(model, paths, trial_run(model)) + heads


def _product_kind(
    model: PreTrainedModel, groups: list[ProjectionGroup], options: EngineOptions
) -> ProductKind:
    in_place = options.restore is Restore.SUBTRACT
    return product_kind(
        model, groups, options.base_product, native=options.native, in_place=in_place
    )


def _adapter_pool(
    model: PreTrainedModel,
    groups: list[ProjectionGroup],
    kind: ProductKind,
    chooser: KernelChooser,
    options: EngineOptions,
) -> AdapterPool:
    memory = options.adapter_memory or share_of_free(model.device, 0.25)
    # Captured steps read their tables by the width of a layer.
    plain = not options.native or options.decode_graphs
    layout = layout_for(model.device, kind.factor_dtype)
    if plain and layout is not FactorLayout.BYTES:
        layout = FactorLayout.ROWS
    return AdapterPool(
        groups,
        budget_bytes=memory,
        device=model.device,
        dtype=model_dtype(model),
        factor_dtype=kind.factor_dtype,
        layout=layout,
        shortens=not plain and kind.factor_dtype is None and chooser.reads_mixed,
        merges=options.mode is not Mode.BYPASS,
    )


def _kv_wish(model: PreTrainedModel, kind: ProductKind, options: EngineOptions) -> KVWish:
    return KVWish(
        memory=options.kv_memory,
        prefix_memory=options.prefix_cache_memory,
        paged=options.paged,
        dtype=options.kv_dtype,
        rounded=kind.rounded,
        max_running=options.max_running,
        window=context_window(model.config),
    )
