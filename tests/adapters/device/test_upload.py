import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dynamic_lora_adapters.device.groups import GroupShape, GroupTerms, ProjectionGroup, split_terms
from dynamic_lora_adapters.device.upload import CudaUpload, HostUpload, upload_for
from dynamic_lora_adapters.terms import LinearTerms


def terms(value: float) -> GroupTerms:
    return GroupTerms(a=torch.full((8, 4), value), b=torch.full((8, 6), value))


def test_every_part_goes_to_its_place() -> None:
    place, nothing = terms(0.0), GroupTerms()
    upload = upload_for(torch.device("cpu"))
    assert upload.write([terms(2.0), nothing], [place, nothing]) is None
    assert place.a is not None and place.b is not None
    assert bool((place.a == 2).all()) and bool((place.b == 2).all())


def test_copies_convert_to_the_dtype_of_the_place() -> None:
    place = torch.zeros(3, dtype=torch.bfloat16)
    source = GroupTerms(bias=torch.full((3,), 1.00390625))
    HostUpload().write([source], [GroupTerms(bias=place)])
    assert place.tolist() == [1.0] * 3


def test_members_are_joined_where_they_are_to_lie() -> None:
    group = ProjectionGroup(paths=("q", "k", "v"), in_features=4, widths=(6, 2, 3))
    both = LinearTerms(a=torch.ones(2, 4), b=torch.full((6, 2), 2.0), bias=torch.ones(6))
    last = LinearTerms(a=torch.full((3, 4), 3.0), b=torch.full((3, 3), 4.0))
    (members,) = split_terms([group], {"q": both, "v": last})
    assert members.shape == GroupShape(8, bias=True)
    place = GroupTerms(
        a=torch.full((8, 4), torch.nan),
        b=torch.full((8, 16), torch.nan)[:, :11],
        columns=torch.full((8, 2), -1),
        bias=torch.full((11,), torch.nan),
    )
    members.write(place)
    joined = members.joined()
    assert place.a is not None and place.b is not None
    assert place.columns is not None and place.bias is not None
    assert place.a[:, 0].tolist() == [1, 1, 3, 3, 3, 0, 0, 0]
    delta = place.b.T @ place.a
    assert delta[:, 0].tolist() == [4] * 6 + [0] * 2 + [36] * 3
    assert place.columns.tolist() == [[0, 6]] * 2 + [[8, 11]] * 3 + [[0, 0]] * 3
    assert place.bias.tolist() == [1] * 6 + [0] * 5
    assert all(torch.equal(part, other) for part, other in joined.parts(place))


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
    event: Any = upload.write([terms], [place])
    assert event is fake
    assert bool((columns == 1).all())
    assert fake.calls == ["pinned torch.bfloat16", "waited", "on the stream", "held", "recorded"]
    assert place.a is not None
    assert bool((place.a == 1).all())
