"""One adapter folded into the base weights, and the base restored bit for bit.

    W = W0 + scale * W0 + b a + dense

computed in float32 and rounded once. Rows of other adapters run on meanwhile:
their plan takes back what the merged weights add (`Effect.UNDO`). Folding and
restoring happen between two steps, so no step sees half-folded weights.
"""

from collections.abc import Sequence

import torch

from dynamic_lora_adapters.groups import GroupTerms
from dynamic_lora_adapters.layers import GroupedProjection
from dynamic_lora_adapters.pristine import Pristine
from dynamic_lora_adapters.slots import ResidentAdapter


class Merger:
    """Holds at most one adapter in the weights. The engine's thread owns it.

    `pristine` says where the weights of the checkpoint are kept, and how they
    are brought back.
    """

    def __init__(self, projections: Sequence[GroupedProjection], pristine: Pristine) -> None:
        self._projections = list(projections)
        self._pristine = pristine
        self._merged: ResidentAdapter | None = None

    @property
    def merged(self) -> ResidentAdapter | None:
        """The adapter that the weights hold."""
        return self._merged

    @property
    def drift(self) -> float:
        """Largest known difference between a restored weight and the checkpoint's; 0 if exact."""
        return self._pristine.drift

    @torch.inference_mode()
    def switch(self, adapter: ResidentAdapter | None) -> None:
        """Make the weights hold `adapter`, or nothing.

        It must be `mergeable`, and the caller keeps it leased meanwhile.
        """
        if adapter is self._merged:
            return
        before = [] if self._merged is None else _terms(self._merged)
        after = [] if adapter is None else _terms(adapter)
        with self._pristine.changing():
            for index, projection in enumerate(self._projections):
                old = before[index] if before and before[index].foldable else None
                new = after[index] if after and after[index].foldable else None
                if old is None and new is None:
                    continue
                weight = self._pristine.weight(index, projection, old)
                if new is not None:
                    weight = new.fold(weight).to(projection.weight.dtype)
                projection.base.replace(weight)
        self._merged = adapter


def _terms(adapter: ResidentAdapter) -> Sequence[GroupTerms]:
    if adapter.exact is not None:
        return adapter.exact
    return [adapter.slab.terms(i, adapter.slot) for i in range(len(adapter.slab.signature))]
