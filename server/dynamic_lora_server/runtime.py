"""Everything that serves: model, tokenizer, registry, engine and service, put together."""

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynamic_lora_adapters.apply.pristine import Restore
from dynamic_lora_adapters.apply.products import ProductKind
from dynamic_lora_adapters.apply.widening import model_dtype
from dynamic_lora_adapters.compositions.saved import SavedCompositions
from dynamic_lora_adapters.device.pool_stats import PoolStats
from dynamic_lora_adapters.files.archive import UploadLimits
from dynamic_lora_adapters.files.template_process import PROCESSES
from dynamic_lora_adapters.home.registry import AdapterRegistry
from dynamic_lora_adapters.home.store import BlobStore
from dynamic_lora_adapters.lora.targets import import_peft
from dynamic_lora_adapters.native import has_matrix_unit, processor, sources_digest
from dynamic_lora_server.base.base_model import BaseModel, resolve_base
from dynamic_lora_server.base.dtypes import named_dtype
from dynamic_lora_server.base.fingerprint import fingerprint
from dynamic_lora_server.base.loading import load_model, num_embeddings, pick_device
from dynamic_lora_server.config import ServerConfig
from dynamic_lora_server.engine.drafting.drafts import MAX_DRAFT, DraftStats
from dynamic_lora_server.engine.graphs.decode_graphs import GraphStats
from dynamic_lora_server.engine.kv.prefix_cache import PrefixStats
from dynamic_lora_server.engine.mode_controller import ModeStats
from dynamic_lora_server.engine.startup.build import BuiltEngine, EngineOptions, build_engine
from dynamic_lora_server.engine.startup.processors import within_quota
from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.modes import Mode
from dynamic_lora_server.recorder import TraceRecorder
from dynamic_lora_server.serving.adapter_loader import AdapterLoader
from dynamic_lora_server.serving.admission import ServiceLimits
from dynamic_lora_server.serving.readers import ReadStats
from dynamic_lora_server.serving.service import GenerationService
from dynamic_lora_server.text import TokenizerView
from dynamic_lora_server.version import own_version

logger = logging.getLogger(__name__)

# How many uploads and compositions are checked at once: each takes a core, and as much memory
# as its terms.
_NUM_CHECKS = 2
# How many uploads are unpacked, and adapters fetched, at once: each holds one of the threads
# that all routes share, a fetch from the Hub for as long as the Hub takes.
_NUM_UNPACKINGS = 2
_NUM_FETCHES = 4


class Tier(StrEnum):
    """Where an adapter's weights are."""

    DEVICE = "device"  # in a slot, ready for the next step
    DISK = "disk"  # in the store; the next request brings it to the device


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The engine at one moment; `graphs` is None where steps are not replayed."""

    num_running: int
    num_waiting: int
    num_steps: int
    num_overlapped: int
    graphs: GraphStats | None
    kv_used_tokens: int
    kv_reserved_tokens: int
    kv_total_tokens: int
    prefixes: PrefixStats
    drafts: DraftStats
    adapters: PoolStats
    reads: ReadStats
    modes: ModeStats
    drift: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """A loaded server without its HTTP side. `start` belongs on the serving event loop.

    Hold `unpacking` to unpack an upload, `fetching` to fetch a source, `checking` to check either
    or try a composition.
    """

    config: ServerConfig
    model_id: str
    model_origin: str
    tokenizer: PreTrainedTokenizerBase
    view: TokenizerView
    registry: AdapterRegistry
    saved: SavedCompositions
    service: GenerationService
    built: BuiltEngine
    loader: AdapterLoader
    device: str
    dtype: str
    fingerprint: str  # of the base model, as it is served
    checking: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_NUM_CHECKS))
    unpacking: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_NUM_UNPACKINGS))
    fetching: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_NUM_FETCHES))

    @classmethod
    def load(
        cls,
        config: ServerConfig,
        *,
        shipped: Path | None = None,
        on_step: Callable[[str], object] = logger.info,
    ) -> "Runtime":
        """Load the model and open the store; takes seconds and blocks.

        `shipped` is a folder of adapters to publish on the first start; by
        default those of the package. `on_step` is told what is being done.
        Raises UnsupportedModel, BaseModelUnavailable, InvalidParameter, an AdapterError where the
        store cannot be had, or OSError where no trace can be recorded.
        """
        store = BlobStore(config.home)  # before what takes long: another server may have it
        try:
            return cls._load(config, store, shipped or shipped_adapters(), on_step)
        except BaseException:
            store.close()
            raise

    @classmethod
    def _load(
        cls,
        config: ServerConfig,
        store: BlobStore,
        shipped: Path,
        on_step: Callable[[str], object],
    ) -> "Runtime":
        PROCESSES.prepare()
        _use_threads(config.threads)
        recorder = None if config.record_trace is None else TraceRecorder(config.record_trace)
        if recorder is not None:
            on_step(f"Recording a trace in {recorder.path}")
        on_step("Finding the base model")
        base = resolve_base(config.model)
        device = pick_device(config.device)
        on_step("Loading the base model")
        model, tokenizer = load_model(base, config, device)
        view = TokenizerView(tokenizer, num_embeddings=num_embeddings(model))
        built = build_engine(
            model, model_id=base.name, options=_options(config, base, model), on_step=on_step
        )
        on_step("Opening the adapter store")
        registry = AdapterRegistry(
            config.home,
            built.geometry,
            store=store,
            limits=UploadLimits(max_bytes=config.max_upload_bytes),
            base=built.weights,
            dtype=model_dtype(model),
            factor_dtype=built.pool.factor_dtype,
            database_url=config.database_url,
            reserved=config.served_model_names,
        )
        logger.info("published %d shipped adapters", len(registry.import_shipped(shipped)))
        if registry.list():
            import_peft()
        saved = SavedCompositions(registry, registry.index)
        _check_free(base.name, config.served_model_names, saved)
        loader = AdapterLoader(registry, built.pool, saved)
        limits = _limits(config, model, tokenizer, built)
        service = GenerationService(built.engine, loader, view, limits, recorder)
        return cls(
            config=config,
            model_id=base.name,
            model_origin=base.origin,
            tokenizer=tokenizer,
            view=view,
            registry=registry,
            saved=saved,
            service=service,
            built=built,
            loader=loader,
            device=str(device),
            dtype=str(model_dtype(model)).removeprefix("torch."),
            fingerprint=_fingerprint(config, base, model),
        )

    @property
    def context_length(self) -> int:
        """Tokens that prompt and output may have together."""
        return self.built.context_length

    @property
    def base_names(self) -> Collection[str]:
        """What names the base model, beside `base`."""
        return (self.model_id, *self.config.served_model_names)

    def name_of_base(self, otherwise: str) -> str:
        """What answers and lists call the base model: its first served name if it has one."""
        return next(iter(self.config.served_model_names), otherwise)

    def start(self) -> None:
        """Start the engine thread; call it on the event loop that will serve."""
        self.service.start()

    def close(self) -> None:
        """Fail what runs, end the engine thread and let the store go."""
        self.service.close()
        self.loader.close()
        self.registry.close()

    def tier(self, digest: str) -> Tier:
        """Where a version's weights are now."""
        return Tier.DEVICE if self.built.pool.is_resident(digest) else Tier.DISK

    def stats(self) -> EngineStats:
        """Counts and sizes at this moment."""
        engine, space = self.built.engine, self.built.space
        scheduler, graphs = engine.scheduler, engine.runner.graphs
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_steps=engine.num_steps,
            num_overlapped=engine.num_overlapped,
            graphs=None if graphs is None else graphs.stats(),
            kv_used_tokens=scheduler.num_used_cells,
            kv_reserved_tokens=scheduler.num_reserved_cells,
            kv_total_tokens=space.num_cells,
            prefixes=scheduler.prefix_stats(),
            drafts=scheduler.draft_stats(),
            adapters=self.built.pool.stats(),
            reads=replace(self.loader.readers.stats),
            modes=self.built.modes.stats(),
            drift=engine.runner.merger.drift,
        )


def shipped_adapters() -> Path:
    """The folder of the adapters that come with the package."""
    return Path(str(files("dynamic_lora_adapters"))) / "shipped"


def _check_free(model_id: str, served_names: Sequence[str], saved: SavedCompositions) -> None:
    """Raise InvalidParameter for a name of the base that is taken.

    An adapter may have the id if it was uploaded while the base was served from a folder.
    """
    fields = dict.fromkeys(served_names, "served_model_names") | {model_id: "model"}
    for name, field_name in fields.items():
        if (taken := saved.spelt_as(name)) is not None:
            raise InvalidParameter(
                f"The base model would be {name!r}, but {taken!r} is the name of an "
                "adapter or of a saved composition.",
                field=field_name,
                fix="Choose another name, or start without this one and delete the other.",
            )


def _use_threads(wanted: int | None) -> None:
    usual = torch.get_num_threads()
    number = within_quota(usual) if wanted is None else wanted
    if number != usual:
        torch.set_num_threads(number)


def _options(config: ServerConfig, base: BaseModel, model: PreTrainedModel) -> EngineOptions:
    speculate = num_drafted(config, model.device)
    return EngineOptions(
        max_running=config.max_running,
        prefill_chunk=config.prefill_chunk,
        adapter_memory=config.adapter_memory,
        kv_memory=config.kv_memory,
        kv_dtype=None if config.kv_dtype == "auto" else named_dtype(config.kv_dtype),
        prefix_cache_memory=config.prefix_cache_memory,
        base_product=_product_kind(config),
        native=config.native,
        mode=Mode(config.mode),
        restore=Restore(config.restore),
        checkpoint=base.path,
        costs_file=_costs_file(config, base, model_dtype(model), drafts=speculate > 0),
        compile_layers=config.compile,
        overlap=None if config.overlap else False,
        speculate=speculate,
    )


def _product_kind(config: ServerConfig) -> ProductKind | None:
    if config.quantize != "none":
        return ProductKind(config.quantize)
    return None if config.base_product == "auto" else ProductKind(config.base_product)


def num_drafted(config: ServerConfig, device: torch.device) -> int:
    """Tokens of a sequence that a step may draft: where nothing was chosen, all that pay."""
    if config.speculate is not None:
        return config.speculate
    return MAX_DRAFT if device.type == "cpu" else 0


def _costs_file(config: ServerConfig, base: BaseModel, dtype: torch.dtype, *, drafts: bool) -> Path:
    """Where measured kernel costs are kept; the name says what they depend on."""
    conditions = (
        own_version(),
        sources_digest(),
        base.name,
        str(base.path),
        (base.path / "config.json").read_text(),
        str(dtype),
        config.device,
        config.base_product,
        config.restore,
        config.quantize,
        config.kv_dtype,
        config.native,
        config.mode == "bypass",
        drafts,
        torch.get_num_threads(),
        torch.__version__,
        processor(),
        has_matrix_unit(),
        torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    )
    key = sha256(repr(conditions).encode()).hexdigest()[:16]
    return config.home / "costs" / f"{key}.json"


def _fingerprint(config: ServerConfig, base: BaseModel, model: PreTrainedModel) -> str:
    dtypes = str(model_dtype(model)), config.quantize, config.kv_dtype
    return fingerprint(base.path, (own_version(), *dtypes, model.device.type))


def _limits(
    config: ServerConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    built: BuiltEngine,
) -> ServiceLimits:
    eos: set[int] = set()
    for source in (model.generation_config, tokenizer):
        declared = getattr(source, "eos_token_id", None)
        if declared is not None:
            eos.update(declared if isinstance(declared, list) else [int(declared)])
    return ServiceLimits(
        context_length=built.context_length,
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        eos_ids=frozenset(eos),
    )
