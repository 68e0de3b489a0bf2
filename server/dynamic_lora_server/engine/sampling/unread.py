"""Tokens that a step on its way chooses: the device has them, the host does not know them yet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dynamic_lora_adapters.transfer import to_device


@dataclass(frozen=True, slots=True)
class UnreadTokens:
    """`token_ids` [num_sampled], int64, on the device; `first_rows` finds them by sequence id."""

    token_ids: torch.Tensor
    first_rows: Mapping[int, int]

    def of(self, sequence_id: int) -> torch.Tensor:
        """The token [1] of a sequence."""
        row = self.first_rows[sequence_id]
        return self.token_ids[row : row + 1]

    def put(self, ids: torch.Tensor, rows: Sequence[tuple[int, int]]) -> None:
        """Write into ids [num_tokens] what is wanted there: pairs of a row and a sequence id."""
        targets = to_device([row for row, _ in rows], ids.device, torch.long)
        sources = to_device([self.first_rows[wanted] for _, wanted in rows], ids.device, torch.long)
        ids.index_copy_(0, targets, self.token_ids.index_select(0, sources))
