"""Copies an adapter's terms into its slot without holding up the batch that runs.

On CUDA the host's copies are pinned and go over on a stream of their own; the
event behind them is what the engine's stream waits for before it first reads
the slot. Elsewhere a copy is a copy.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from dynamic_lora_adapters.device.groups import GroupTerms


class Source(Protocol):
    """Terms of one group, joined or not."""

    def joined(self) -> GroupTerms:
        """The terms side by side, in float32."""

    def write(self, place: GroupTerms) -> None:
        """Put them where they are to lie."""


Sources = Iterable[Source]
Places = Sequence[GroupTerms]


class Upload(Protocol):
    """A way to bring terms to the device. Safe to call from any thread."""

    def write(self, sources: Sources, places: Places) -> torch.cuda.Event | None:
        """Start the copies; None if they are done when this returns, else what to wait for."""


class HostUpload:
    """Terms are joined where they are to lie, done on return."""

    def write(self, sources: Sources, places: Places) -> None:
        """Write."""
        for source, place in zip(sources, places, strict=True):
            source.write(place)


class CudaUpload:
    """Pinned staging and a stream of its own.

    The stream first waits for what the device has been given so far: the
    slot's memory may still be read by a step that is on its way, or have been
    freed by one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def write(self, sources: Sources, places: Places) -> torch.cuda.Event:
        """Queue the copies on the stream; pinned memory outlives them by torch's own count."""
        staged = [
            _pinned(source.joined(), place) for source, place in zip(sources, places, strict=True)
        ]
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream):
            for terms, place in zip(staged, places, strict=True):
                for part, target in terms.parts(place):
                    target.copy_(part, non_blocking=True)
                    if target.is_cuda:  # what kernels read on the host stays there
                        target.record_stream(self._stream)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event


def upload_for(device: torch.device) -> Upload:
    """The way to bring terms to a device."""
    return CudaUpload(device) if device.type == "cuda" else HostUpload()


def _pinned(terms: GroupTerms, place: GroupTerms) -> GroupTerms:
    """Copies in the place's dtype and in pinned memory, but of what stays on the host."""

    def pinned(part: torch.Tensor | None, target: torch.Tensor | None) -> torch.Tensor | None:
        if part is None or target is None:
            return None
        return part.to(target.dtype).pin_memory()

    return GroupTerms(
        a=pinned(terms.a, place.a),
        b=pinned(terms.b, place.b),
        columns=terms.columns,
        scale=pinned(terms.scale, place.scale),
        dense=pinned(terms.dense, place.dense),
        bias=pinned(terms.bias, place.bias),
    )
