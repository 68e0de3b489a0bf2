"""Slabs with random tables, without a pool around them, and writes to slots that wait."""

import threading

import pytest
import torch

from dynamic_lora_adapters.device.groups import GroupShape
from dynamic_lora_adapters.device.slab import ResidentAdapter, Slab
from dynamic_lora_adapters.device.upload import HostUpload, Places, Sources


def make_slab(
    num_slots: int,
    rank: int,
    in_features: int,
    out_features: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    number: int = 0,
) -> Slab:
    """A slab of one group whose slots all hold random factors of moderate size."""
    a = torch.randn(num_slots, rank, in_features, generator=generator) / in_features**0.5
    b = torch.randn(num_slots, rank, out_features, generator=generator) / rank**0.5
    return Slab(
        number=number,
        signature=(GroupShape(rank),),
        a=[a.to(dtype)],
        b=[b.to(dtype)],
        num_bytes=0,
        tenants=[None] * num_slots,
    )


def resident(slab: Slab, slot: int) -> ResidentAdapter:
    """An adapter that sits in a slot of the slab."""
    adapter = ResidentAdapter(f"{slab.number}/{slot}", slab, slot)
    slab.tenants[slot] = adapter
    return adapter


def hold_writes(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Let every slot's writing wait: when one has begun, and for it to go on."""
    writing, go_on = threading.Event(), threading.Event()
    write = HostUpload.write

    def slowly(self: HostUpload, sources: Sources, places: Places) -> None:
        writing.set()
        assert go_on.wait(10)
        write(self, sources, places)

    monkeypatch.setattr(HostUpload, "write", slowly)
    return writing, go_on
