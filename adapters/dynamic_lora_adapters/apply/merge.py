"""One adapter folded into the base weights, and the base restored bit for bit.

    W = W0 + scale * W0 + b a + dense

computed in float32 and rounded once. Rows of other adapters run on meanwhile:
their plan takes back what the merged weights add (`Effect.UNDO`). Folding and
restoring happen between two steps, so no step sees half-folded weights.
"""

from collections.abc import Sequence
from functools import cached_property

import torch

from dynamic_lora_adapters.apply.layers import GroupedProjection
from dynamic_lora_adapters.apply.pristine import Pristine
from dynamic_lora_adapters.device.groups import GroupTerms, ProjectionGroup
from dynamic_lora_adapters.device.slab import ResidentAdapter
from dynamic_lora_adapters.native.product import Bfloat16Product, Int8Product, NativeProduct
from dynamic_lora_adapters.weight import in_one

_ROUNDED = (Bfloat16Product, Int8Product)
# Other rows get W x back as (W + BA) x - BA x, whose error grows as BA does beside W,
_LARGEST_DELTA = 4.0
# or in eight bits as the largest weight of an output does.
_LARGEST_STEP = 2.0


class MergeFailed(Exception):
    """A switch broke off; the weights are the base's again."""


class WeightsLost(Exception):
    """A switch broke off, and the base could not be brought back: nothing may be computed."""


class Merger:
    """Holds at most one adapter in the weights. The engine's thread owns it.

    `pristine` says where the weights of the checkpoint are kept, and how they
    are brought back.
    """

    def __init__(self, projections: Sequence[GroupedProjection], pristine: Pristine) -> None:
        self._projections = list(projections)
        self._pristine = pristine
        self._merged: ResidentAdapter | None = None
        self._largest_norms: list[torch.Tensor] | None = None
        self._steps: dict[int, torch.Tensor] = {}  # of the base's weights in eight bits

    @property
    def merged(self) -> ResidentAdapter | None:
        """The adapter that the weights hold."""
        return self._merged

    @property
    def drift(self) -> float:
        """Largest known difference between a restored weight and the checkpoint's; 0 if exact."""
        return self._pristine.drift

    @cached_property
    def rounds(self) -> bool:
        """Whether merged weights have fewer bits than float32; the rows of others notice then."""
        return any(
            projection.dtype != torch.float32 or isinstance(projection.base, _ROUNDED)
            for projection in self._projections
        )

    @torch.inference_mode()
    def spares_others(self, adapter: ResidentAdapter) -> bool:
        """Whether the rows of others keep their digits while the weights hold `adapter`.

        No layer's delta may be larger than _LARGEST_DELTA times its weight, by Frobenius norms;
        nor may a step of weights in eight bits become more than _LARGEST_STEP times as large, for
        any output. Takes a part of what a switch takes. Raises MergeFailed where that
        cannot be reckoned, for want of memory for instance.
        """
        try:
            adapter.await_upload()
            return self._spares_others(_terms(adapter))
        except Exception as error:
            raise MergeFailed(f"{type(error).__name__}: {error}") from error

    def _spares_others(self, terms: Sequence[GroupTerms]) -> bool:
        limits = self._measured()
        for index, projection in enumerate(self._projections):
            found = _plain(terms, projection.group, index)
            if found is None:
                continue
            norms = found.delta_norms(projection.group.widths).cpu()
            if not bool((norms <= limits[index]).all()):
                return False
            if index in self._steps and not self._keeps_steps(index, found):
                return False
        return True

    def _keeps_steps(self, index: int, terms: GroupTerms) -> bool:
        projection = self._projections[index]
        base = projection.base
        assert isinstance(base, Int8Product)
        if terms.low_rank and terms.a is not None and terms.b is not None:
            steps = base.steps_folded(projection.kept, terms.a.float(), terms.b.float())
        else:
            steps = terms.fold(projection.weight).abs().amax(1) / 127
        return bool((steps <= _LARGEST_STEP * self._steps[index]).all())

    def _measured(self) -> list[torch.Tensor]:
        """For each group [members], how large a delta may be; measured once, of the base."""
        if self._largest_norms is None:
            assert self._merged is None, "the first switch measures before it merges"
            self._largest_norms = [
                _LARGEST_DELTA
                * torch.tensor(
                    [
                        float(torch.linalg.vector_norm(part, dtype=torch.float32))
                        for part in projection.of_members(projection.kept)
                    ]
                )
                for projection in self._projections
            ]
            self._steps = {
                index: projection.base.steps
                for index, projection in enumerate(self._projections)
                if isinstance(projection.base, Int8Product)
            }
        return self._largest_norms

    @torch.inference_mode()
    def switch(self, adapter: ResidentAdapter | None) -> None:
        """Make the weights hold `adapter`, or nothing.

        It must be `mergeable`, and the caller keeps it leased meanwhile. If a
        layer fails, for want of memory for instance, the base is restored: raises
        MergeFailed, or WeightsLost if that fails, too.
        """
        if adapter is self._merged:
            return
        self._measured()  # as long as the weights are the base's
        if adapter is not None:
            adapter.await_upload()
        before = [] if self._merged is None else _terms(self._merged)
        after = [] if adapter is None else _terms(adapter)
        index = 0
        with self._pristine.changing():
            try:
                for index in range(len(self._projections)):
                    self._switch_group(index, before, after)
            except Exception as error:
                self._merged = None
                self._restore(before, after[: index + 1])
                raise MergeFailed(f"{type(error).__name__}: {error}") from error
        self._merged = adapter

    def forget_copies(self) -> None:
        """Give back the memory that merges have taken for copies; nothing may be merged."""
        assert self._merged is None, "it is needed to bring the base back"
        self._pristine.forget_copies()

    def _restore(self, before: Sequence[GroupTerms], after: Sequence[GroupTerms]) -> None:
        """Bring back the groups that held `before`, and those that `after` was to come to.

        No others: that takes memory, of which there may be none.
        """
        try:
            for index, projection in enumerate(self._projections):
                if _foldable(before, index) or _foldable(after, index):
                    self._pristine.restore(index, projection)
        except Exception as error:
            raise WeightsLost(
                f"the base's weights cannot be brought back: {type(error).__name__}: {error}"
            ) from error

    def _switch_group(
        self, index: int, before: Sequence[GroupTerms], after: Sequence[GroupTerms]
    ) -> None:
        projection = self._projections[index]
        old, new = _foldable(before, index), _plain(after, projection.group, index)
        if old is None and new is None:
            return
        weight = self._pristine.weight(index, projection, old)
        if new is None:
            projection.base.replace(weight)
        elif isinstance(projection.base, NativeProduct) and new.a is not None and new.low_rank:
            assert new.b is not None
            projection.base.replace_folded(weight, new.a.float(), new.b.float())
        else:
            folded = new.fold(in_one(weight, projection.dtype))
            projection.base.replace(folded.to(projection.dtype))


def _foldable(terms: Sequence[GroupTerms], index: int) -> GroupTerms | None:
    """The terms on a group, if there are any that its weight can hold."""
    return terms[index] if index < len(terms) and terms[index].foldable else None


def _plain(terms: Sequence[GroupTerms], group: ProjectionGroup, index: int) -> GroupTerms | None:
    """The same with factors as rows."""
    found = _foldable(terms, index)
    return None if found is None else found.plain(group)


def _terms(adapter: ResidentAdapter) -> Sequence[GroupTerms]:
    if adapter.exact is not None:
        return adapter.exact
    return adapter.slab.places(adapter.slot)
