"""The engine's state as Prometheus reads it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dynamic_lora_server.metrics import Reading

if TYPE_CHECKING:
    from dynamic_lora_adapters.device.pool_stats import PoolStats
    from dynamic_lora_server.engine.drafting.drafts import DraftStats
    from dynamic_lora_server.engine.graphs.decode_graphs import GraphStats
    from dynamic_lora_server.engine.kv.prefix_cache import PrefixStats
    from dynamic_lora_server.engine.mode_controller import ModeStats
    from dynamic_lora_server.runtime import EngineStats
    from dynamic_lora_server.serving.demand import Demand
    from dynamic_lora_server.serving.readers import ReadStats


def readings_of(stats: "EngineStats") -> list[Reading]:
    """All that there is to read of the engine at one moment."""
    return [
        Reading("running_sequences", "Sequences in the batch.", stats.num_running),
        Reading(
            "waiting_sequences",
            "Sequences that wait for the KV cache or a place in the batch.",
            stats.num_waiting,
        ),
        Reading(
            "kv_used_tokens", "Tokens of running sequences in the KV cache.", stats.kv_used_tokens
        ),
        Reading(
            "kv_reserved_tokens",
            "Tokens that running sequences have room for in it.",
            stats.kv_reserved_tokens,
        ),
        Reading("kv_total_tokens", "Tokens that the KV cache can hold.", stats.kv_total_tokens),
        Reading("engine_steps", "Steps that the engine ran.", stats.num_steps, total=True),
        Reading(
            "overlapped_steps",
            "Steps that were started before the one before was read.",
            stats.num_overlapped,
            total=True,
        ),
        *_of_prefixes(stats.prefixes),
        *_of_drafts(stats.drafts),
        *_of_graphs(stats.graphs),
        *_of_adapters(stats.adapters, stats.reads),
        *_of_modes(stats.modes),
        Reading("weight_drift", "Largest error of a restored weight.", stats.drift),
    ]


def readings_of_demand(demand: "Demand", queues: Mapping[str, int]) -> list[Reading]:
    """Who waits for what before the engine has it; `queues` are further lines of work."""
    text = "Pieces of work that wait for a thread, by what they are."
    waiting = sorted({**demand.queues, **queues}.items())
    return [
        Reading("places_taken", "Continuations that were admitted.", demand.num_open),
        Reading("places_total", "Continuations that may be there at a time.", demand.capacity),
        Reading(
            "places_waiting_for_adapters",
            "Continuations whose adapter is not on the device yet.",
            demand.num_held_up,
        ),
        Reading("room_waiting_adapters", "Adapters that wait for room on it.", demand.num_in_line),
        Reading(
            "room_wait_seconds", "How long the first of them has waited.", demand.first_waited_s
        ),
        *(Reading("queue_length", text, number, label=("queue", name)) for name, number in waiting),
    ]


def _of_prefixes(prefixes: "PrefixStats") -> list[Reading]:
    return [
        Reading(
            "prefix_blocks", "Blocks of prompts and answers that are kept.", prefixes.num_blocks
        ),
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
        Reading("prefix_evicted_blocks", "Blocks given up.", prefixes.num_evictions, total=True),
    ]


def _of_drafts(drafts: "DraftStats") -> list[Reading]:
    return [
        Reading(
            "drafted_tokens",
            "Tokens that were run before they were known to come.",
            drafts.num_drafted,
            total=True,
        ),
        Reading(
            "accepted_draft_tokens", "Drafted tokens that came.", drafts.num_accepted, total=True
        ),
    ]


def _of_graphs(graphs: "GraphStats | None") -> list[Reading]:
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


def _of_adapters(pool: "PoolStats", reads: "ReadStats") -> list[Reading]:
    return [
        Reading("adapters_resident", "Adapters on the device.", pool.num_resident),
        Reading("adapters_in_use", "Adapters that running requests use.", pool.num_leased),
        Reading("adapter_used_bytes", "Device memory adapters take.", pool.used_bytes),
        Reading("adapter_budget_bytes", "Device memory adapters may take.", pool.budget_bytes),
        Reading("adapter_loads", "Adapters brought to it.", pool.num_loads, total=True),
        Reading("adapter_evictions", "Adapters evicted.", pool.num_evictions, total=True),
        Reading("adapter_reads", "Adapters read from the store.", reads.num_reads, total=True),
        Reading(
            "adapter_read_seconds",
            "Time that reading adapters took, checks included.",
            reads.seconds,
            total=True,
        ),
    ]


def _of_modes(modes: "ModeStats") -> list[Reading]:
    return [
        Reading("mode_switches", "Merges and unmerges.", modes.num_switches, total=True),
        Reading("mode_switch_seconds", "Time they took.", modes.switch_s, total=True),
        Reading("merged_tokens", "Run on merged weights.", modes.num_merged_rows, total=True),
        Reading("bypass_tokens", "Run with deltas.", modes.num_bypass_rows, total=True),
        Reading("base_tokens", "Run for the base model.", modes.num_base_rows, total=True),
    ]
