"""How large the KV cache becomes, what is kept in it, and how its cells are divided."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from dynamic_lora_adapters.apply.widening import model_dtype
from dynamic_lora_adapters.geometry import LayerGeometry
from dynamic_lora_server.engine.attention.paged import PAGE_SIZE
from dynamic_lora_server.engine.kv.cache import KVCache
from dynamic_lora_server.engine.kv.layout import KVLayout, contiguous_layout, paged_layout
from dynamic_lora_server.engine.kv.prefix_cache import BLOCK_SIZE
from dynamic_lora_server.engine.startup.memory import share_of_free
from dynamic_lora_server.errors import InvalidParameter

logger = logging.getLogger(__name__)

# The part of the free memory that is taken where nobody says how much.
_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class KVWish:
    """What is asked for; memory in bytes.

    `memory` None is a share of what is free; `prefix_memory` is the part of it that may
    hold prompt prefixes. `paged` None means: on CUDA. `dtype` None is the model's, or
    bfloat16 where the model's weights are `rounded`. At most `max_running` sequences of
    `window` tokens run together.
    """

    memory: int | None
    prefix_memory: int | None
    paged: bool | None
    dtype: torch.dtype | None
    rounded: bool
    max_running: int
    window: int

    def in_pages(self, device: torch.device) -> bool:
        """Whether the cache is made of pages on this device."""
        return device.type == "cuda" if self.paged is None else self.paged


@dataclass(frozen=True, slots=True)
class KVPlan:
    """Who may use which cells, and what is kept in each."""

    layout: KVLayout
    paged: bool
    dtype: torch.dtype

    def cache(self, layers: Sequence[LayerGeometry], device: torch.device) -> KVCache:
        """The tensors for it."""
        # Behind what is handed out, one page for the padding of static steps.
        num_cells = self.layout.num_cells + (PAGE_SIZE if self.paged else 0)
        return KVCache(
            layers,
            num_cells=num_cells,
            device=device,
            dtype=self.dtype,
            aside=self.layout.aside,
        )


def plan_kv(
    layers: Sequence[LayerGeometry], wish: KVWish, device: torch.device, dtype: torch.dtype
) -> KVPlan:
    """The KV cache that is wished for. Raises InvalidParameter, naming the option."""
    paged = wish.in_pages(device)
    per_token = KVCache.bytes_per_token(layers, dtype)
    memory = wish.memory or share_of_free(device, _SHARE)
    num_cells = memory // per_token
    if num_cells < (PAGE_SIZE if paged else 1):
        raise InvalidParameter(
            f"kv_memory of {memory} bytes holds {num_cells} tokens of {per_token} bytes each.",
            field="kv_memory",
            fix="Give the KV cache more memory.",
        )
    # No more than every running sequence at its full window can ever use.
    most_used = wish.max_running * (_whole_pages(wish.window) if paged else wish.window)
    prefix_cells = _prefix_cells(wish.prefix_memory, per_token, num_cells, paged=paged)
    if paged:
        layout = paged_layout(
            num_cells, page_size=PAGE_SIZE, most_used=most_used, prefix_cells=prefix_cells
        )
    else:
        layout = contiguous_layout(
            num_cells, window=wish.window, most_used=most_used, prefix_cells=prefix_cells
        )
    if wish.prefix_memory is None and not layout.prefixes.enabled:
        logger.warning(
            "No prompt's beginning is kept: of the KV cache's %d tokens one request may need all. "
            "More --kv-memory, or --prefix-cache-memory, changes that",
            num_cells,
        )
    return KVPlan(layout, paged, dtype)


def kv_dtype(model: PreTrainedModel, wish: KVWish) -> torch.dtype:
    """The dtype of keys and values; what reads them in pages takes the model's alone.

    Raises InvalidParameter for one that cannot be had.
    """
    on_pages = wish.in_pages(model.device)
    shortens = model.device.type == "cpu" and model_dtype(model) == torch.float32 and not on_pages
    if wish.dtype is None:
        return torch.bfloat16 if wish.rounded and shortens else model_dtype(model)
    if wish.dtype == model_dtype(model) or (wish.dtype == torch.bfloat16 and shortens):
        return wish.dtype
    wanted, own = (str(dtype).removeprefix("torch.") for dtype in (wish.dtype, model_dtype(model)))
    raise InvalidParameter(
        f"kv_dtype = {wanted} cannot be had here: keys and values are kept in the model's dtype, "
        f"{own}, or, on a CPU beside float32 and not in pages, in bfloat16.",
        field="kv_dtype",
        fix="Leave the option out.",
    )


def _whole_pages(num_tokens: int) -> int:
    """The cells of the pages that so many tokens of one sequence take."""
    return -(-num_tokens // PAGE_SIZE) * PAGE_SIZE


def _prefix_cells(memory: int | None, per_token: int, num_cells: int, *, paged: bool) -> int | None:
    """Cells that prefixes may take; None leaves it to the layout."""
    if memory is None or memory == 0:
        return memory
    smallest, largest = (PAGE_SIZE, num_cells) if paged else (BLOCK_SIZE, num_cells - 1)
    wanted = memory // per_token
    if not smallest <= wanted <= largest:
        raise InvalidParameter(
            f"prefix_cache_memory of {memory} bytes is {wanted} tokens; it must hold at least "
            f"{smallest} and leave room among the KV cache's {num_cells}.",
            field="prefix_cache_memory",
            fix="Give it another part of the KV cache's memory, or 0 to keep no prefixes.",
        )
    return wanted
