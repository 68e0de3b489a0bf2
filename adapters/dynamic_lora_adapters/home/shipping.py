"""Which of the adapters that come with the package a home is to have."""

import logging
from collections.abc import Sequence
from pathlib import Path

from dynamic_lora_adapters.home.index import AdapterEvent, shipped_digests, shipped_was_lost
from dynamic_lora_adapters.home.inspection import declared_base
from dynamic_lora_adapters.names import model_leaf

logger = logging.getLogger(__name__)


def is_wanted(
    name: str,
    source: Path,
    events: Sequence[AdapterEvent],
    *,
    current: str | None,
    model_id: str,
) -> bool:
    """Whether a shipped adapter is to be published, if `current` is not its content already.

    `events` are the name's history, `current` is the content that it means now. What the user
    deleted or gave to another adapter is the user's; what was trained on another base is skipped.
    """
    shipped = shipped_digests(events)
    if shipped and current is None and not shipped_was_lost(events):
        return False
    if current is not None and current not in shipped:
        logger.info("shipped adapter %r skipped: the name is taken", name)
        return False
    declared = declared_base(source)
    if declared is not None and model_leaf(declared) != model_leaf(model_id):
        logger.info("shipped adapter %r skipped: The adapter was trained on %s", name, declared)
        return False
    return True
