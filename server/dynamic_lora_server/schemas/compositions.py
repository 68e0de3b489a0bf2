"""Compositions on the wire: as parts of a request, and the bodies of `/compositions`."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from dynamic_lora_adapters.compositions.composition import MAX_PARTS, MAX_WEIGHT
from dynamic_lora_server.schemas._base import Answer, NonEmptyText, Wire, null_is

_Weight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)]


class WeightedAdapter(Wire):
    """One adapter of a composition."""

    name: NonEmptyText = Field(description="`ner`, or `ner@` and the start of its version.")
    weight: Annotated[_Weight, null_is(1.0, _Weight)] = 1.0


WeightedAdapters = Annotated[list[WeightedAdapter], Field(min_length=1, max_length=MAX_PARTS)]


class MergedAdapters(Wire):
    """LoRAX's way to name several adapters.

    `linear` is the exact weighted sum. The others prune the adapters' deltas
    to `density` first, at random (`dare_*`, always the same draw) or by size;
    `ties` and `dare_ties` then let the adapters elect each entry's sign.
    """

    ids: Annotated[list[NonEmptyText], Field(min_length=1, max_length=MAX_PARTS)]
    weights: Annotated[list[_Weight], Field(max_length=MAX_PARTS)] | None = Field(
        default=None, description="As many as `ids`; none: 1 for each."
    )
    merge_strategy: (
        Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"] | None
    ) = Field(default=None, description="Default linear.")
    density: float | None = Field(
        default=None, ge=0, le=1, description="Above 0; linear takes 0 or none."
    )
    majority_sign_method: Literal["total", "frequency"] | None = Field(
        default=None, description="For ties and dare_ties; default total."
    )


class NewComposition(Wire):
    """The body of `PUT /compositions/{name}`: `adapter`, or `adapters`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"adapter": "ner*0.7+tone*0.3"}]})

    adapter: NonEmptyText | None = Field(default=None, description="As in `?adapter=`.")
    adapters: WeightedAdapters | None = None


class CompositionPart(Answer):
    """One adapter of a saved composition."""

    name: str
    pinned: str | None = Field(description="The start of its version, if it is pinned to one.")
    weight: float
    version: str | None = Field(
        description="Its content hash now; null if it is gone, or not what is pinned."
    )


class SavedComposition(Answer):
    """A saved composition; `version` is null while one of its adapters is missing."""

    name: str
    adapter: str = Field(description="The canonical text.")
    version: str | None = Field(description="The hash of what it computes now.")
    parts: list[CompositionPart]
    created_at: datetime


class CompositionList(Answer):
    """The answer of `GET /compositions`, by name."""

    compositions: list[SavedComposition]
