"""Compositions: weighted sums of adapters, as values. Imports no torch."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from typing import Self

from dynamic_lora_adapters.errors import AdapterError, AdapterNotFound
from dynamic_lora_adapters.names import RESERVED_NAMES

MAX_PARTS = 16
MAX_WEIGHT = 100.0


class InvalidComposition(AdapterError):
    """A composition that cannot be read or has no meaning; `column` counts from 1."""

    def __init__(
        self,
        message: str,
        *,
        column: int | None = None,
        field: str | None = "adapter",
        fix: str | None = None,
    ) -> None:
        super().__init__(message, field=field, fix=fix)
        self.column = column


class VersionNotFound(AdapterNotFound):
    """The adapter exists, but not in the version that a composition pins."""

    def __init__(self, name: str, version: str, current: str) -> None:
        super().__init__(name)
        self.message = (
            f"The adapter {name!r} has no version {version!r}; its version is {current[:12]!r}."
        )
        self.args = (self.message,)
        self.fix = "Superseded versions are not kept: name the current one, or none."


class Strategy(StrEnum):
    """How deltas are merged, other than by their weighted sum."""

    TIES = "ties"  # Yadav et al. 2023
    DARE_LINEAR = "dare_linear"  # Yu et al. 2023
    DARE_TIES = "dare_ties"
    MAGNITUDE_PRUNE = "magnitude_prune"

    @property
    def elects_sign(self) -> bool:
        """Whether the parts vote on each entry's sign."""
        return self in (Strategy.TIES, Strategy.DARE_TIES)


class SignMethod(StrEnum):
    """What counts in a vote on a sign: the sum of the values, or the number of parts."""

    TOTAL = "total"
    FREQUENCY = "frequency"


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """A strategy with its settings; `density` is the share of entries that is kept."""

    strategy: Strategy
    density: float
    sign_method: SignMethod = SignMethod.TOTAL

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise InvalidComposition(
                f"density must lie above 0 and be at most 1; it is {_written(self.density)}.",
                field="density",
            )


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """One adapter of a composition; `version` is the start of its content hash, or None."""

    name: str
    version: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.name in RESERVED_NAMES:
            raise InvalidComposition(
                f"{self.name!r} is what every composition adds to.", fix="Leave it out."
            )
        if not abs(self.weight) <= MAX_WEIGHT:  # NaN too
            raise InvalidComposition(
                f"The weight of {self.label!r} is {_written(self.weight)}; weights lie between "
                f"-{MAX_WEIGHT:g} and {MAX_WEIGHT:g}."
            )

    @property
    def label(self) -> str:
        """The name, with the version where one is pinned."""
        return self.name if self.version is None else f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Composition:
    """What a request is served with. Without parts it is the base model.

    `of` makes canonical ones, equal if they mean the same: parts sorted by
    name, one for each name and version, none of weight 0. Weights add up as
    they are written in decimals: 0.1 + 0.2 - 0.3 is nothing. With `merge`, parts
    vote even at weight 0, so that those are kept and twice the same is refused.
    """

    parts: tuple[Part, ...] = ()
    merge: Merge | None = None

    def __post_init__(self) -> None:
        if len(self.parts) > MAX_PARTS:
            raise InvalidComposition(
                f"The composition has {len(self.parts)} adapters; {MAX_PARTS} are allowed."
            )

    @classmethod
    def of(cls, parts: Iterable[Part], *, merge: Merge | None = None) -> Self:
        """The canonical composition of the parts. Raises InvalidComposition."""
        parts = list(parts)
        if merge is not None:
            _refuse_repeats(parts)
            return cls(tuple(sorted(parts, key=_key)), merge)
        exact: dict[tuple[str, str], Fraction] = defaultdict(Fraction)
        for part in parts:
            exact[_key(part)] += _decimal(part.weight)
        # Rounded last: the order in which parts are named must not matter.
        sums = {key: float(weight) for key, weight in exact.items()}
        return cls(
            tuple(
                Part(name, version or None, sums[name, version])
                for name, version in sorted(sums)
                if sums[name, version] != 0
            )
        )

    @property
    def is_base(self) -> bool:
        """Whether nothing is added to the base model."""
        return not self.parts

    @property
    def plain(self) -> Part | None:
        """The only part, if this is one adapter as it was trained."""
        if self.merge is None and len(self.parts) == 1 and self.parts[0].weight == 1:
            return self.parts[0]
        return None

    @property
    def alone(self) -> Part | None:
        """The only part, if one adapter is added to the base, at any weight above 0."""
        if self.merge is None and len(self.parts) == 1 and self.parts[0].weight > 0:
            return self.parts[0]
        return None

    def scaled(self, factor: float) -> Self:
        """The composition with all weights multiplied, in decimals as in `of`."""
        exact = _decimal(factor)
        return replace(
            self,
            parts=tuple(
                replace(part, weight=float(_decimal(part.weight) * exact)) for part in self.parts
            ),
        )

    def __str__(self) -> str:
        """The canonical text, `base` without parts; a plain sum's can be parsed again."""
        if self.merge is None:
            return _sum_text(self.parts) or "base"
        signs = f",sign={self.merge.sign_method}" if self.merge.strategy.elects_sign else ""
        return f"{self.merge.strategy}({_sum_text(self.parts)},density={self.merge.density}{signs})"

    def digest(self, digests: Sequence[str]) -> str:
        """SHA-256, in hex, of what is computed; `digests` are the parts' content hashes.

        Names do not count. Of a plain adapter it is the adapter's own.
        """
        if self.plain is not None:
            return digests[0]
        content = sorted(
            (digest, part.weight) for digest, part in zip(digests, self.parts, strict=True)
        )
        how = None if self.merge is None else _merge_key(self.merge)
        text = json.dumps(["composition", 1, content, how], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _key(part: Part) -> tuple[str, str]:
    return part.name, part.version or ""


def _decimal(weight: float) -> Fraction:
    """The shortest decimal that reads as `weight`: what was written, not its binary neighbour."""
    return Fraction(repr(weight))


def _written(number: float) -> str:
    return repr(number).removesuffix(".0")


def _refuse_repeats(parts: Sequence[Part]) -> None:
    names = [part.name for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise InvalidComposition(
                f"{name!r} is merged twice, which would count its votes twice.",
                fix="Name each adapter once.",
            )


def _sum_text(parts: Sequence[Part]) -> str:
    text = ""
    for index, part in enumerate(parts):
        weight = _written(abs(part.weight))
        # A minus after a bare name would be read as a part of the name.
        bare = weight == "1" and not (index + 1 < len(parts) and parts[index + 1].weight < 0)
        sign = "-" if part.weight < 0 else "+" if text else ""
        text += f"{sign}{part.label}" + ("" if bare else f"*{weight}")
    return text


def _merge_key(merge: Merge) -> list[object]:
    signs = str(merge.sign_method) if merge.strategy.elects_sign else None
    return [str(merge.strategy), merge.density, signs]
