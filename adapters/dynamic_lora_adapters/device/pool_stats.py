"""How full the device's memory for adapters is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """A snapshot of the pool, sizes in bytes."""

    num_resident: int
    num_leased: int
    used_bytes: int
    budget_bytes: int
    num_loads: int
    num_evictions: int
