"""Adapters on their way to the device: what they take there, reckoned before anything is copied."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from dynamic_lora_adapters.device.groups import (
    MemberTerms,
    ProjectionGroup,
    foldable,
    split_terms,
)
from dynamic_lora_adapters.device.slab_layout import SlabKind, SlabLayout
from dynamic_lora_adapters.device.upload import Source
from dynamic_lora_adapters.rows import row_bytes
from dynamic_lora_adapters.terms import AdapterTerms


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Incoming:
    """An adapter's terms, and the room that they need: a slot of `kind`, and `own_bytes` beside it.

    `keeps_exact` says whether its terms in float32 are among the latter, for merges.
    """

    terms: AdapterTerms
    members: Sequence[MemberTerms]
    kind: SlabKind
    own_bytes: int
    mergeable: bool
    keeps_exact: bool

    @property
    def num_bytes(self) -> int:
        """What it takes in all."""
        return self.kind.slot_bytes + self.own_bytes

    def sources(self, dtype: torch.dtype) -> Iterable[Source]:
        """What is written to a slot whose terms are in `dtype`, made one group after the other."""
        if dtype is not torch.float16:
            return self.members
        return (one.joined().fitted(dtype) for one in self.members)


class Reckoner:
    """Finds out what adapters take on a device, in terms of `dtype`.

    The slabs are those of the first of `layouts` whose factors hold an adapter's without loss,
    else of the last. With `merges`, terms that `dtype` would round are kept in float32 too.
    """

    def __init__(
        self,
        groups: Sequence[ProjectionGroup],
        layouts: Sequence[SlabLayout],
        *,
        device: torch.device,
        dtype: torch.dtype,
        merges: bool,
    ) -> None:
        self._groups = groups
        self._layouts = layouts
        self._dtype = dtype
        self._merges = merges
        self._on_host = device.type == "cpu"

    def reckon(self, terms: AdapterTerms) -> Incoming:
        """What an adapter takes, by its shapes; its factors are read, and nothing is copied."""
        members = split_terms(self._groups, terms.linears)
        mergeable = not terms.invocation_ids and foldable(terms.linears)
        keeps_exact = self._merges and mergeable and self._dtype is not torch.float32
        own_bytes = row_bytes(terms, self._dtype)
        if keeps_exact and self._on_host:  # where the device has memory of its own, none of that
            own_bytes += sum(one.num_bytes for one in members)
        return Incoming(
            terms=terms,
            members=members,
            kind=self._kind_of(members),
            own_bytes=own_bytes,
            mergeable=mergeable,
            keeps_exact=keeps_exact,
        )

    def _kind_of(self, members: Sequence[MemberTerms]) -> SlabKind:
        signature = tuple(one.shape for one in members)
        *shorter, last = self._layouts
        for layout in shorter:
            if all(one.fits(layout.factor_dtype) for one in members):
                return SlabKind(signature, layout)
        return SlabKind(signature, last)
