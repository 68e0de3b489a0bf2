"""One adapter's folder: what it says, what it does, and the passport that tells of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamic_lora_adapters.base_weights import BaseWeights, NoWeights
from dynamic_lora_adapters.errors import AdapterError
from dynamic_lora_adapters.files.archive import CONFIG_FILE, check_weights
from dynamic_lora_adapters.files.card import CARD_FILE, TaskCard
from dynamic_lora_adapters.files.chat import ChatFormat
from dynamic_lora_adapters.files.json_file import read_json_object
from dynamic_lora_adapters.files.safetensors_file import WEIGHTS_FILE
from dynamic_lora_adapters.geometry import BaseGeometry
from dynamic_lora_adapters.home.passport import Passport, write_passport
from dynamic_lora_adapters.home.self_check import self_check
from dynamic_lora_adapters.kinds import KindSpec, kind_notes, read_kind
from dynamic_lora_adapters.lora.config_values import read_text
from dynamic_lora_adapters.lora.spec import LoraSpec
from dynamic_lora_adapters.lora.weights import content_digest, read_with_notes
from dynamic_lora_adapters.names import check_base_model
from dynamic_lora_adapters.terms import AdapterTerms
from dynamic_lora_adapters.threads import single_threaded
from dynamic_lora_adapters.value_range import check_range

if TYPE_CHECKING:
    import torch

# Enough for the longest lists that are accepted.
_MAX_CONFIG_BYTES = 4 << 20
_BASE_KEY = "base_model_name_or_path"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterVersion:
    """A name and the content it means at one moment. Versions never change."""

    name: str
    digest: str
    passport: Passport
    card: TaskCard | None
    chat: ChatFormat | None = None

    def marked(self, *, fetched: bool) -> "AdapterVersion":
        """The same, with a passport that says whether it was fetched."""
        return replace(self, passport=self.passport.model_copy(update={"fetched": fetched}))


def declared_base(folder: Path) -> str | None:
    """The base model that the adapter says it was trained on, if it says."""
    return read_text(_config(folder), _BASE_KEY)


def folder_digest(folder: Path) -> str:
    """The content digest of an adapter's files. Raises an `AdapterError` for a broken config."""
    card = folder / CARD_FILE
    content = read_json_object(card) if card.exists() else None
    spec = _parse(_config(folder))
    return content_digest(spec, folder / WEIGHTS_FILE, content, ChatFormat.read(folder))


def is_sound(folder: Path, digest: str) -> bool:
    """Whether a folder holds the content of this digest, whole and unchanged."""
    try:
        return folder_digest(folder) == digest
    except (AdapterError, OSError):
        return False


class Inspector:
    """Reads and checks adapters for one base model, served in `dtype` (float32 if None).

    Their low-rank factors are kept in `factor_dtype`, or in `dtype`.
    `base` gives the base's own parameters; without it the adapters that need
    them cannot be read (ValueError).
    """

    def __init__(
        self,
        geometry: BaseGeometry,
        *,
        base: BaseWeights | None = None,
        dtype: "torch.dtype | None" = None,
        factor_dtype: "torch.dtype | None" = None,
    ) -> None:
        self._geometry = geometry
        self._base = base or NoWeights()
        self._dtype = dtype
        self._factor_dtype = factor_dtype

    @property
    def dtype(self) -> "torch.dtype":
        """The number format that adapters are served in."""
        import torch

        return self._dtype or torch.float32

    @single_threaded()
    def read(self, folder: Path) -> AdapterTerms:
        """What the adapter does, every tensor checked. Raises an `AdapterError`.

        Its values are checked here too: it may have been published for another dtype.
        """
        terms, _ = self._read(folder, _config(folder))
        check_range(terms, self.dtype)
        return terms

    @single_threaded()
    def inspect(
        self, name: str, folder: Path, *, force: bool, ignored_files: Sequence[str]
    ) -> AdapterVersion:
        """Check everything about the adapter in `folder` and write its passport.

        `force` accepts an adapter that declares another base model. Whether its chat template can
        be compiled is left to `ChatFormat.check`. Raises an `AdapterError`.
        """
        check_weights(folder, ignored_files)
        config = _config(folder)
        spec = _parse(config)
        card, chat = TaskCard.read(folder), ChatFormat.read(folder)
        declared = read_text(config, _BASE_KEY)
        notes = check_base_model(declared, self._geometry.model_id, force=force)
        if revision := read_text(config, "revision"):
            notes.append(f"The adapter was trained on revision {revision!r} of its base.")
        terms, told = self._read(folder, config)
        difference = self_check(terms, self._geometry, self.dtype, self._factor_dtype)
        check_range(terms, self.dtype)
        digest = folder_digest(folder)
        passport = write_passport(
            name=name,
            version=digest,
            created_at=datetime.now(UTC),
            folder=folder,
            kind=spec.kind if isinstance(spec, LoraSpec) else spec.peft_type.lower(),
            base_model=declared,
            terms=terms,
            self_check=difference,
            dtype=self._format(),
            card=card,
            chat=chat,
            notes=[*notes, *told],
            ignored_files=ignored_files,
        )
        return AdapterVersion(name=name, digest=digest, passport=passport, card=card, chat=chat)

    def _format(self) -> str:
        """What adapters are served in, in words."""
        whole, factors = (str(d).removeprefix("torch.") for d in (self.dtype, self._factor_dtype))
        if self._factor_dtype in (None, self.dtype):
            return whole
        return f"{whole} with factors in {'eight bits' if factors == 'uint8' else factors}"

    def _read(self, folder: Path, config: Mapping[str, Any]) -> tuple[AdapterTerms, list[str]]:
        spec = _parse(config)
        if isinstance(spec, LoraSpec):
            return read_with_notes(folder, spec, self._geometry, self._base)
        notes = kind_notes(config)
        return read_kind(folder, config, self._geometry, self._base), notes


def _config(folder: Path) -> dict[str, Any]:
    return read_json_object(folder / CONFIG_FILE, max_bytes=_MAX_CONFIG_BYTES)


def _parse(config: Mapping[str, Any]) -> LoraSpec | KindSpec:
    if config.get("peft_type") in (None, "LORA"):
        return LoraSpec.parse(config)
    return KindSpec.parse(config)
