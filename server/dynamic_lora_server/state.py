"""What one application shares between its requests, and how it comes up and goes down."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import TYPE_CHECKING

from dynamic_lora_server.config import ServerConfig
from dynamic_lora_server.errors import NotReady
from dynamic_lora_server.generation import GenerationEvent, GenerationSpec
from dynamic_lora_server.metrics import EngineCollector, Metrics, Reading

if TYPE_CHECKING:
    from dynamic_lora_server.engine.decode_graphs import GraphStats
    from dynamic_lora_server.runtime import Runtime

Load = Callable[[], "Runtime"]


class ServerState:
    """Configuration, metrics and, once it is loaded, the runtime."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.started_at = time.time()
        self.metrics = Metrics()
        self.metrics.registry.register(EngineCollector(self._readings, self._resident))
        self._runtime: Runtime | None = None
        self._why_not = "The model is still loading."

    @property
    def runtime(self) -> "Runtime":
        """The loaded runtime. Raises NotReady before and after, saying why."""
        if self._runtime is None:
            raise NotReady(self._why_not, fix="GET /ready answers 200 when the server is ready.")
        return self._runtime

    def generate(self, spec: GenerationSpec) -> AsyncGenerator[GenerationEvent, None]:
        """Start a generation, seen by the metrics. The generator must be closed."""
        events = self.runtime.service.stream(spec)
        return self.metrics.observed(events)

    async def come_up(self, load: Load) -> None:
        """Load the runtime on a thread of its own, and start it on this event loop.

        A failure is remembered for `/ready` and raised. Cancelling leaves the
        thread to end with the process: a load cannot be interrupted.
        """
        try:
            runtime = await _on_daemon_thread(load)
        except Exception as error:
            self._why_not = f"The model could not be loaded: {error}"
            raise
        runtime.start()
        self._runtime = runtime

    async def go_down(self) -> None:
        """Refuse new requests, then fail those that run and free the model."""
        runtime, self._runtime = self._runtime, None
        self._why_not = "The server is shutting down."
        if runtime is not None:
            await asyncio.to_thread(runtime.close)

    def _readings(self) -> list[Reading]:
        if self._runtime is None:
            return []
        stats = self._runtime.stats()
        pool, modes, prefixes = stats.adapters, stats.modes, stats.prefixes
        return [
            Reading("running_sequences", "Sequences in the batch.", stats.num_running),
            Reading("waiting_sequences", "Sequences that wait for a place.", stats.num_waiting),
            Reading("kv_used_tokens", "Tokens that the KV cache holds.", stats.kv_used_tokens),
            Reading("kv_total_tokens", "Tokens that the KV cache can hold.", stats.kv_total_tokens),
            Reading("prefix_blocks", "Blocks of prompts that are kept.", prefixes.num_blocks),
            Reading(
                "prefix_lookup_tokens",
                "Prompt tokens that were looked up in the prefix cache.",
                prefixes.num_looked_up,
                total=True,
            ),
            Reading(
                "prefix_hit_tokens",
                "Prompt tokens that were found there and not computed.",
                prefixes.num_reused,
                total=True,
            ),
            Reading(
                "prefix_evicted_blocks", "Blocks given up.", prefixes.num_evictions, total=True
            ),
            Reading("engine_steps", "Steps that the engine ran.", stats.num_steps, total=True),
            Reading(
                "overlapped_steps",
                "Steps that were started before the one before was read.",
                stats.num_overlapped,
                total=True,
            ),
            *_graph_readings(stats.graphs),
            Reading("adapters_resident", "Adapters on the device.", pool.num_resident),
            Reading("adapters_in_use", "Adapters that running requests use.", pool.num_leased),
            Reading("adapter_used_bytes", "Device memory adapters take.", pool.used_bytes),
            Reading("adapter_budget_bytes", "Device memory adapters may take.", pool.budget_bytes),
            Reading("adapter_loads", "Adapters brought to it.", pool.num_loads, total=True),
            Reading(
                "adapter_reads", "Adapters read from the store.", stats.reads.num_reads, total=True
            ),
            Reading(
                "adapter_read_seconds",
                "Time that reading adapters took, checks included.",
                stats.reads.seconds,
                total=True,
            ),
            Reading("mode_switches", "Merges and unmerges.", modes.num_switches, total=True),
            Reading("mode_switch_seconds", "Time they took.", modes.switch_s, total=True),
            Reading("merged_tokens", "Run on merged weights.", modes.num_merged_rows, total=True),
            Reading("bypass_tokens", "Run with deltas.", modes.num_bypass_rows, total=True),
            Reading("base_tokens", "Run for the base model.", modes.num_base_rows, total=True),
            Reading("weight_drift", "Largest error of a restored weight.", stats.drift),
            Reading("adapter_evictions", "Adapters evicted.", pool.num_evictions, total=True),
        ]

    def _resident(self) -> Mapping[str, bool]:
        if self._runtime is None:
            return {}
        passports = self._runtime.registry.list()
        return {p.name: self._runtime.tier(p.version) == "device" for p in passports}


def _graph_readings(graphs: "GraphStats | None") -> list[Reading]:
    """What became of steps where they can be replayed as CUDA graphs."""
    if graphs is None:
        return []
    replayed = Reading(
        "graph_steps", "Steps replayed as CUDA graphs.", graphs.num_replayed, total=True
    )
    text = "Steps that ran without a CUDA graph, by what they hold that graphs do not."
    declined = [
        Reading("graph_declined_steps", text, number, total=True, label=("reason", reason))
        for reason, number in sorted(graphs.num_declined.items())
    ]
    return [replayed, *declined]


async def _on_daemon_thread(load: Load) -> "Runtime":
    """As `asyncio.to_thread`, but a process that ends does not wait for the thread."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[Runtime] = loop.create_future()

    def settle(runtime: "Runtime | None", error: BaseException | None) -> None:
        if outcome.cancelled():
            if runtime is not None:
                runtime.registry.close()
        elif error is not None:
            outcome.set_exception(error)
        elif runtime is not None:
            outcome.set_result(runtime)

    def run() -> None:
        runtime, failure = None, None
        try:
            runtime = load()
        except BaseException as error:
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, runtime, failure)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await outcome
