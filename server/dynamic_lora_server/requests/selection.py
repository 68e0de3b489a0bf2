"""Which adapters a request asks for, out of the several places where it can say so."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamic_lora_adapters.compositions.composition import (
    Composition,
    Merge,
    Part,
    SignMethod,
    Strategy,
)
from dynamic_lora_adapters.compositions.text import parse_label
from dynamic_lora_adapters.files.card import TaskCard
from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.generation import BASE
from dynamic_lora_server.schemas.compositions import MergedAdapters, WeightedAdapter
from dynamic_lora_server.schemas.generate import GenerateRequest

if TYPE_CHECKING:
    from dynamic_lora_adapters.compositions.saved import SavedCompositions
    from dynamic_lora_adapters.files.chat import ChatFormat
    from dynamic_lora_adapters.home.inspection import AdapterVersion


# What TGI's and the Hub's clients send as the model where their caller named none.
_UNNAMED = frozenset({"tgi", "dummy"})


def adapter_name(name: str | None, *, base_names: Collection[str]) -> str | None:
    """The adapter a request names; None where it names the base model or nothing."""
    return None if name is None or name == BASE or name in base_names else name


def openai_adapter_name(
    name: str | None, *, base_names: Collection[str], known: Callable[[str], bool]
) -> str | None:
    """As `adapter_name`, for `model`: a client's stand-in for a name is one if `known` has it."""
    if name is None or (name in _UNNAMED and not known(name)):
        return None
    return adapter_name(name, base_names=base_names)


def select(
    query: str | None,
    body: GenerateRequest,
    *,
    saved: "SavedCompositions",
    base_names: Collection[str],
) -> Composition:
    """What `?adapter=` or the body of `/generate` names; nothing named is the base model.

    Raises InvalidParameter where two places name different things or a name is
    empty, and what `SavedCompositions.resolve` raises.
    """
    asked = _one_place(query, body)
    match asked:
        case MergedAdapters():
            parts, merge = merged_parts(asked)
            return saved.combine(parts, merge=merge)
        case list():
            return saved.combine(weighted_parts(asked))
    name = adapter_name(asked, base_names=base_names)
    return Composition() if name is None else saved.resolve(name)


@dataclass(frozen=True, slots=True)
class ChatAdapter:
    """What a chat's `model` names, in the versions that its parts have now."""

    adapter: Composition
    versions: "Sequence[AdapterVersion]"

    @property
    def chat(self) -> "ChatFormat | None":
        """How the adapter chats, if it is one alone and says so."""
        return None if self.adapter.alone is None else self.versions[0].chat

    @property
    def digest(self) -> str | None:
        """The version of the whole; the base model has none."""
        if not self.versions:
            return None
        return self.adapter.digest([version.digest for version in self.versions])


def select_chat(
    model: str | None, *, saved: "SavedCompositions", base_names: Collection[str]
) -> ChatAdapter:
    """The adapter of a chat; None is the base model.

    Raises what `SavedCompositions.resolve` does.
    """
    name = openai_adapter_name(model, base_names=base_names, known=saved.has)
    adapter = Composition() if name is None else saved.resolve(name)
    return ChatAdapter(adapter, [saved.version(part) for part in adapter.parts])


def card_of(composition: Composition, versions: "Sequence[AdapterVersion]") -> TaskCard | None:
    """The task card of a composition whose parts are `versions`.

    That is the card of the parts with a positive weight if they all ask and
    decode alike (the same template and parameters); otherwise there is none,
    as no one template is the right one.
    """
    pairs = zip(composition.parts, versions, strict=True)
    cards = [version.card for part, version in pairs if part.weight > 0]
    if not cards or any(_ways(card) != _ways(cards[0]) for card in cards):
        return None
    return cards[0]


def _ways(card: TaskCard | None) -> object:
    return None if card is None else (card.prompt_template, card.parameters)


def weighted_parts(adapters: Sequence[WeightedAdapter]) -> list[Part]:
    """The parts of an `adapters` list. Raises InvalidComposition."""
    return [Part(*parse_label(adapter.name), adapter.weight) for adapter in adapters]


def merged_parts(asked: MergedAdapters) -> tuple[list[Part], Merge | None]:
    """The parts of `merged_adapters`, and how they are merged (None: by their sum).

    Raises InvalidComposition, and InvalidParameter for settings that are
    missing or that the strategy has no use for.
    """
    weights = [1.0] * len(asked.ids) if asked.weights is None else asked.weights
    if len(weights) != len(asked.ids):
        raise InvalidParameter(
            f"merged_adapters has {len(asked.ids)} ids and {len(weights)} weights.",
            field="parameters.merged_adapters.weights",
            fix="Give one weight for each id, or none at all.",
        )
    pairs = zip(asked.ids, weights, strict=True)
    return [Part(*parse_label(name), weight) for name, weight in pairs], _merge(asked)


def _merge(asked: MergedAdapters) -> Merge | None:
    name = asked.merge_strategy or "linear"
    if name == "linear":
        _refuse_unused("density", asked.density or None, name)
        _refuse_unused("majority_sign_method", asked.majority_sign_method, name)
        return None
    strategy = Strategy(name)
    if not strategy.elects_sign:
        _refuse_unused("majority_sign_method", asked.majority_sign_method, name)
    if not asked.density:
        raise InvalidParameter(
            f"merge_strategy {name} needs a density above 0.",
            field="parameters.merged_adapters.density",
            fix="Say which share of each delta is to be kept, for example 0.5.",
        )
    sign_method = SignMethod(asked.majority_sign_method or "total")
    return Merge(strategy=strategy, density=asked.density, sign_method=sign_method)


def _refuse_unused(setting: str, value: object, strategy: str) -> None:
    if value is not None:
        raise InvalidParameter(
            f"merge_strategy {strategy} has no use for {setting}.",
            field=f"parameters.merged_adapters.{setting}",
            fix="Leave one of the two out.",
        )


def _one_place(
    query: str | None, body: GenerateRequest
) -> str | list[WeightedAdapter] | MergedAdapters | None:
    places = {
        "?adapter=": query,
        "parameters.adapter_id": body.parameters.adapter_id,
        "adapters": body.adapters,
        "parameters.adapters": body.parameters.adapters,
        "parameters.merged_adapters": body.parameters.merged_adapters,
    }
    given = [(place, value) for place, value in places.items() if value is not None]
    if not given:
        return None
    _refuse_empty(given)
    (first, asked), *others = given
    for place, value in others:
        if value != asked:
            raise InvalidParameter(
                f"{first} names {_shown(asked)}, but {place} names {_shown(value)}.",
                field="adapter",
                fix="Name the adapter in one place.",
            )
    return asked


def _refuse_empty(given: Sequence[tuple[str, object]]) -> None:
    """A name left blank is a mistake of the client's, not a wish for the base model."""
    for place, value in given:
        if isinstance(value, str) and not value.strip():
            raise InvalidParameter(
                f"{place} is empty.",
                field="adapter",
                fix="Name an adapter; for the base model leave it out, or name 'base'.",
            )


def _shown(asked: str | list[WeightedAdapter] | MergedAdapters) -> str:
    if isinstance(asked, str):
        return repr(asked)
    names = asked.ids if isinstance(asked, MergedAdapters) else [part.name for part in asked]
    return ", ".join(map(repr, names))
