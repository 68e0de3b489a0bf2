"""Copies an adapter's terms into its slot without holding up the batch that runs.

On CUDA the host's copies are pinned and go over on a stream of their own; the
event behind them is what the engine's stream waits for before it first reads
the slot. Elsewhere a copy is a copy.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from dynamic_lora_adapters.groups import GroupTerms

Copies = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""Pairs of a place on the device and what goes there."""

_PARTS = ("a", "b", "scale", "dense", "bias")


class Upload(Protocol):
    """A way to bring terms to the device. Safe to call from any thread."""

    def stage(self, terms: Iterable[GroupTerms], dtype: torch.dtype) -> Iterable[GroupTerms]:
        """The terms as `write` takes them."""

    def write(self, copies: Copies) -> torch.cuda.Event | None:
        """Start the copies; None if they are done when this returns, else what to wait for."""


class HostUpload:
    """Plain copies, done on return; each group's terms are asked for when their turn comes."""

    def stage(self, terms: Iterable[GroupTerms], dtype: torch.dtype) -> Iterable[GroupTerms]:
        """The terms as they are: copying converts them."""
        del dtype
        return terms

    def write(self, copies: Copies) -> None:
        """Copy."""
        for target, source in copies:
            target.copy_(source)


class CudaUpload:
    """Pinned staging and a stream of its own.

    The stream first waits for what the device has been given so far: the
    slot's memory may still be read by a step that is on its way, or have been
    freed by one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def stage(self, terms: Iterable[GroupTerms], dtype: torch.dtype) -> Iterable[GroupTerms]:
        """Copies in the slot's dtype and in pinned memory."""

        def pinned(part: torch.Tensor | None) -> torch.Tensor | None:
            return None if part is None else part.to(dtype).pin_memory()

        return [
            GroupTerms(columns=one.columns, **{name: pinned(getattr(one, name)) for name in _PARTS})
            for one in terms
        ]

    def write(self, copies: Copies) -> torch.cuda.Event:
        """Queue the copies on the stream; pinned memory outlives them by torch's own count."""
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in copies:
                target.copy_(source, non_blocking=True)
                if target.is_cuda:  # what kernels read on the host stays there
                    target.record_stream(self._stream)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event


def upload_for(device: torch.device) -> Upload:
    """The way to bring terms to a device."""
    return CudaUpload(device) if device.type == "cuda" else HostUpload()


def slot_copies(
    places: Iterable[GroupTerms], terms: Iterable[GroupTerms]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What goes where: the parts of `terms` and their places in a slot, group by group."""
    for place, term in zip(places, terms, strict=True):
        for name in (*_PARTS, "columns"):
            target, source = getattr(place, name), getattr(term, name)
            if target is not None:
                yield target, source
