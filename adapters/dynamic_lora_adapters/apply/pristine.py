"""The weights of the checkpoint while others are in use: where they are kept, how they return."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum

import torch

from dynamic_lora_adapters.apply.layers import GroupedProjection
from dynamic_lora_adapters.base_weights import BaseWeights, ModelWeights
from dynamic_lora_adapters.device.groups import GroupTerms
from dynamic_lora_adapters.weight import Weight


class Restore(StrEnum):
    """How the base comes back after a merge.

    COPY from a copy, bit for bit. SUBTRACT takes the adapter's terms away
    again, which needs no copy and drifts by rounding.
    """

    COPY = "copy"
    SUBTRACT = "subtract"


class Pristine(ABC):
    """Gives the checkpoint's weight of each group, whatever is merged."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.drift = 0.0

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Held while weights change, so that `value` never reads a half-changed one."""
        with self._lock:
            yield

    @abstractmethod
    def weight(self, index: int, projection: GroupedProjection, held: GroupTerms | None) -> Weight:
        """The group's weight [out, in] without `held`, the terms that are in it now."""

    @abstractmethod
    def value(self, index: int, projection: GroupedProjection) -> Weight:
        """The group's weight [out, in] as the checkpoint has it; from any thread."""

    def restore(self, index: int, projection: GroupedProjection) -> None:
        """Have the layer multiply by that again, whatever it holds."""
        projection.base.replace(self.value(index, projection))

    @abstractmethod
    def forget_copies(self) -> None:
        """Drop copies of weights that are the checkpoint's now, if there are any."""


class CopiedWeights(Pristine):
    """Keeps a copy in host memory of each layer that a merge has touched, from then on.

    Products that are `separate` from the model's parameters need none: the
    parameters are never touched.
    """

    def __init__(self) -> None:
        super().__init__()
        self._copies: dict[int, torch.Tensor] = {}

    def weight(self, index: int, projection: GroupedProjection, held: GroupTerms | None) -> Weight:
        """As the base class says; bit for bit."""
        if projection.base.separate:
            return projection.kept
        if index not in self._copies:
            assert held is None, "the copy is made before the first merge"
            self._copies[index] = _host_copy(projection.weight.detach())
        return self._copies[index].to(projection.weight.device, non_blocking=True)

    def value(self, index: int, projection: GroupedProjection) -> Weight:
        """As the base class says."""
        with self._lock:
            copy = self._copies.get(index)
            if copy is not None:
                return copy
            return projection.kept if projection.base.separate else projection.weight.clone()

    def restore(self, index: int, projection: GroupedProjection) -> None:
        """As the base class says; what was never copied was never changed."""
        if projection.base.separate or index in self._copies:
            super().restore(index, projection)

    def forget_copies(self) -> None:
        """As the base class says."""
        with self._lock:
            self._copies.clear()


class SubtractedWeights(Pristine):
    """Takes the merged terms away in float32, and watches what rounding leaves behind.

    The drift is measured on SAMPLE_ROWS rows of each group, of which a copy is
    kept. Once it is more than MAX_DRIFT of the group's largest weight there,
    the group is read from the checkpoint again by `reload(index)`.
    """

    SAMPLE_ROWS = 16
    MAX_DRIFT = 2.0**-8

    def __init__(
        self, projections: Sequence[GroupedProjection], reload: Callable[[int], torch.Tensor]
    ) -> None:
        super().__init__()
        self._reload = reload
        # Of what is never changed in place nothing drifts.
        changed = {i: p.weight for i, p in enumerate(projections) if not p.base.separate}
        self._rows = {i: _spread(len(w), self.SAMPLE_ROWS) for i, w in changed.items()}
        self._samples = {
            i: weight[self._rows[i].to(weight.device)].clone() for i, weight in changed.items()
        }
        self._drifts = [0.0] * len(projections)
        self.num_refreshes = 0

    def weight(self, index: int, projection: GroupedProjection, held: GroupTerms | None) -> Weight:
        """As the base class says, up to the drift."""
        if held is None or projection.base.separate:
            return projection.kept
        weight = held.unfold(projection.weight).to(projection.weight.dtype)
        self._measure(index, weight)
        sample = self._samples[index]
        if self._drifts[index] > self.MAX_DRIFT * float(sample.abs().max()):
            weight = self._reload(index).to(weight.device, weight.dtype)
            self._measure(index, weight)
            self.num_refreshes += 1
        self.drift = max(self._drifts)
        return weight

    def value(self, index: int, projection: GroupedProjection) -> Weight:
        """As the base class says, read from the checkpoint."""
        return projection.kept if projection.base.separate else self._reload(index)

    def forget_copies(self) -> None:
        """As the base class says: there are none."""

    def _measure(self, index: int, weight: torch.Tensor) -> None:
        now = weight[self._rows[index].to(weight.device)]
        self._drifts[index] = float((now.float() - self._samples[index].float()).abs().max())


class PristineWeights:
    """`BaseWeights` of a model whose layers may hold a merged adapter. Safe from any thread."""

    def __init__(
        self,
        model: torch.nn.Module,
        projections: Sequence[GroupedProjection],
        pristine: Pristine,
    ) -> None:
        self._others: BaseWeights = ModelWeights(model)
        self._pristine = pristine
        self._places = {
            path: (index, number)
            for index, projection in enumerate(projections)
            for number, path in enumerate(projection.group.paths)
        }
        self._projections = projections

    def parameter(self, name: str, rows: Sequence[int] | None = None) -> torch.Tensor:
        """The checkpoint's value, or that of rows, in fp32 on the CPU; raises KeyError."""
        path, _, leaf = name.rpartition(".")
        place = self._places.get(path)
        if leaf != "weight" or place is None:
            return self._others.parameter(name, rows)
        index, number = place
        projection = self._projections[index]
        weight = projection.of_members(self._pristine.value(index, projection))[number]
        # `Conv1D` stores its weight as [in, out].
        weight = weight.T if projection.transposed else weight
        chosen = weight if rows is None else weight[list(rows)]
        exact: torch.Tensor = chosen.to("cpu", torch.float32)
        return exact


def _host_copy(weight: torch.Tensor) -> torch.Tensor:
    """A copy in host memory. A GPU reads it at the full speed of the bus if it is pinned."""
    host = torch.empty_like(weight, device="cpu", pin_memory=weight.device.type == "cuda")
    return host.copy_(weight)


def _spread(length: int, count: int) -> torch.Tensor:
    """`count` indices spread evenly over a range, or all of it."""
    return torch.linspace(0, length - 1, min(count, length)).long()
