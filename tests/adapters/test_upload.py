import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dynamic_lora_adapters.groups import GroupTerms
from dynamic_lora_adapters.upload import CudaUpload, HostUpload, slot_copies, upload_for


def terms(value: float) -> GroupTerms:
    return GroupTerms(a=torch.full((8, 4), value), b=torch.full((8, 6), value))


def test_every_part_goes_to_its_place() -> None:
    place, nothing = terms(0.0), GroupTerms()
    upload = upload_for(torch.device("cpu"))
    staged = upload.stage([terms(2.0), nothing], torch.float32)
    assert upload.write(slot_copies([place, nothing], staged)) is None
    assert place.a is not None and place.b is not None
    assert bool((place.a == 2).all()) and bool((place.b == 2).all())


def test_copies_convert_to_the_dtype_of_the_place() -> None:
    place = torch.zeros(3, dtype=torch.bfloat16)
    HostUpload().write([(place, torch.full((3,), 1.00390625))])
    assert place.tolist() == [1.0] * 3


class FakeCuda:
    """Stands for torch.cuda and notes what is asked of it, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        for name in ("Stream", "Event", "default_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: self)
        monkeypatch.setattr(torch.cuda, "stream", self._stream)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self._pin(tensor))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: self.calls.append("held"))
        # Places on the device are those of weights; columns are read on the host.
        on_device = property(lambda tensor: tensor.is_floating_point())
        monkeypatch.setattr(torch.Tensor, "is_cuda", on_device)

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.calls.append(f"pinned {tensor.dtype}")
        return tensor

    @contextlib.contextmanager
    def _stream(self, _: object) -> Iterator[None]:
        self.calls.append("on the stream")
        yield

    def wait_stream(self, _: object) -> None:
        self.calls.append("waited")

    def record(self, _: object) -> None:
        self.calls.append("recorded")


def test_cuda_copies_wait_for_what_runs_and_leave_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    upload = CudaUpload(torch.device("cuda"))
    columns = torch.zeros(2, 2, dtype=torch.long)
    place = GroupTerms(a=torch.zeros(2, 2, dtype=torch.bfloat16), columns=columns)
    terms = GroupTerms(a=torch.ones(2, 2), columns=torch.ones(2, 2, dtype=torch.long))
    staged = upload.stage([terms], torch.bfloat16)
    event: Any = upload.write(slot_copies([place], staged))
    assert event is fake
    assert bool((columns == 1).all())
    assert fake.calls == ["pinned torch.bfloat16", "waited", "on the stream", "held", "recorded"]
    assert place.a is not None
    assert bool((place.a == 1).all())
