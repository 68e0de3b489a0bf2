"""The angles by which a model rotates queries and keys: for which positions, and computed once."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from dynamic_lora_server.engine.decoder.llama_layers import Unsuited

# RoPE kinds whose angles depend on the longest sequence in the batch; up to the
# original window they do not.
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
# Positions that tables are kept for at most: 16 MiB with heads of 128.
_MOST_POSITIONS = 2**14
# Positions that are asked for alone, too: a short sequence.
_FEW = 8


def context_window(config: PreTrainedConfig) -> int:
    """Tokens a sequence may have: the model's window, or less where RoPE demands it."""
    window = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
        original = rope.get("original_max_position_embeddings")
        original = original or getattr(config, "original_max_position_embeddings", None)
        window = min(window, int(original or window))
    return window


@dataclass(frozen=True, slots=True)
class Rotation:
    """Tables cos and sin [positions, dim], and the row in them of each token, int64."""

    cos: torch.Tensor
    sin: torch.Tensor
    places: torch.Tensor


class RotaryTables:
    """What a model's rotary embedding gives, kept for the first positions of its window.

    Later positions are left to the module, step by step, and all of them where angles depend on
    what else is asked for. `like` has the dtype and device of hidden states. Raises Unsuited for
    a module that gives anything else than one row for each position.
    """

    def __init__(self, module: nn.Module, window: int, like: torch.Tensor) -> None:
        self._module = module
        self._num_positions = min(window, _MOST_POSITIONS)
        positions = torch.arange(self._num_positions, device=like.device)
        self._cos, self._sin = self._computed(like, positions)
        first = self._computed(like, positions[:_FEW])
        if not all(map(torch.equal, first, (self._cos[:_FEW], self._sin[:_FEW]))):
            self._num_positions = 0

    def rotation(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> Rotation:
        """How tokens at these positions [1, num_tokens] are rotated."""
        positions = position_ids[0]
        if int(positions.max()) < self._num_positions:
            return Rotation(self._cos, self._sin, positions)
        return Rotation(*self._computed(hidden, positions), torch.arange(len(positions)))

    def _computed(
        self, hidden: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self._module(hidden, positions[None])
        if cos.dim() != 3 or cos.shape != sin.shape or cos.shape[:2] != (1, len(positions)):
            raise Unsuited(f"its rotary embedding gives {tuple(cos.shape)} and {tuple(sin.shape)}")
        return cos[0].float().contiguous(), sin[0].float().contiguous()
