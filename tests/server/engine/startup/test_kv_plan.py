"""What becomes of the memory that the KV cache is given."""

import logging

import pytest
import torch

from dynamic_lora_adapters.geometry import LayerGeometry
from dynamic_lora_server.engine.startup.kv_plan import KVPlan, KVWish, plan_kv

LAYERS = [LayerGeometry(1, 4, 4)]
TOKEN_BYTES = 32


def plan(num_tokens: int, *, window: int, prefix_memory: int | None = None) -> KVPlan:
    wish = KVWish(
        memory=num_tokens * TOKEN_BYTES,
        prefix_memory=prefix_memory,
        paged=False,
        dtype=None,
        rounded=False,
        max_running=64,
        window=window,
    )
    return plan_kv(LAYERS, wish, torch.device("cpu"), torch.float32)


def test_a_window_that_does_not_fit_leaves_the_prefix_cache_on() -> None:
    layout = plan(8192, window=131072).layout
    assert (layout.space.num_cells, layout.prefixes._pages.num_cells) == (6144, 2048)


def test_it_is_said_that_no_prefixes_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert plan(1024, window=512).layout.prefixes.enabled
        assert not plan(512, window=512, prefix_memory=0).layout.prefixes.enabled
        assert caplog.messages == []
        assert not plan(512, window=512).layout.prefixes.enabled
    (message,) = caplog.messages
    assert message.startswith("No prompt's beginning is kept: of the KV cache's 512 tokens")
