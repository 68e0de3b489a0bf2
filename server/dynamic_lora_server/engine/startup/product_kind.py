"""Which way to multiply by the base's weights: the one that was asked for, or the fastest."""

import logging

from transformers import PreTrainedModel

from dynamic_lora_adapters.apply.inject import linear_at, weight_of
from dynamic_lora_adapters.apply.products import EXACT_KINDS, ProductKind, fastest_kind, obstacle
from dynamic_lora_adapters.apply.widening import computed_bytes, model_dtype
from dynamic_lora_adapters.device.groups import ProjectionGroup
from dynamic_lora_server.engine.decoder.llama_layers import has_llama_layers
from dynamic_lora_server.engine.startup.memory import free_memory
from dynamic_lora_server.errors import InvalidParameter

logger = logging.getLogger(__name__)


def product_kind(
    model: PreTrainedModel,
    groups: list[ProjectionGroup],
    wanted: ProductKind | None,
    *,
    native: bool,
    in_place: bool,
) -> ProductKind:
    """The kind that was asked for, or the fastest that this machine has memory for.

    Without `native` it is none of C++; merges `in_place` take one that reads the weights
    themselves. Raises InvalidParameter, naming the reason, for one that cannot be had.
    """
    layers = [group for group in groups if not group.is_head]
    if not layers:
        return ProductKind.PLAIN
    widest = max(layers, key=lambda group: group.widths[0] * group.in_features)
    weight = weight_of(linear_at(model, widest.paths[0])).to(model_dtype(model))
    if wanted is not None:
        if (reason := obstacle(wanted, weight)) is not None:
            raise InvalidParameter(
                f"base_product = {wanted} cannot be had here: {reason}.",
                field="base_product",
                fix="Leave the option out: the fastest of those that can be had is used.",
            )
        return wanted
    # Packed weights leave the parameters as they are: nothing to subtract from.
    if in_place or model.device.type != "cpu" or not _has_memory(model):
        return ProductKind.PLAIN
    kinds = [k for k in EXACT_KINDS if native or k is not ProductKind.NATIVE]
    obstacles = {kind: obstacle(kind, weight) for kind in kinds}
    for kind, reason in obstacles.items():
        if reason is not None:
            logger.info("No %s products: %s", kind, reason)
    possible = [kind for kind in kinds if obstacles[kind] is None]
    return fastest_kind(weight, possible, whole_layers=has_llama_layers(model))


def _has_memory(model: PreTrainedModel) -> bool:
    """Whether packed copies of the weights take less than half of what is free, or no more than
    plain products would: those widen weights that are kept in fewer bits."""
    own, free = sum(p.nbytes for p in model.parameters()), free_memory(model.device)
    copy = computed_bytes(model)
    if 2 * copy < free:
        return True
    if copy > own:
        logger.warning(
            "Memory is short: weights take %d MiB of %d MiB in float32; --quantize int8 takes a "
            "quarter",
            *(copy >> 20, free >> 20),
        )
        return True
    logger.warning(
        "Weights are not packed, and products are slower for it: a copy takes %d MiB, and of "
        "free memory (%d MiB) half is for the caches",
        *(copy >> 20, free >> 20),
    )
    return False
