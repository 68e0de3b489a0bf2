"""The passport: what the server knows about one adapter and what it checked."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dynamic_lora_adapters.files.card import TaskCard
from dynamic_lora_adapters.files.chat import ChatFormat
from dynamic_lora_adapters.files.safetensors_file import WEIGHTS_FILE, read_header
from dynamic_lora_adapters.terms import AdapterTerms, EmbeddingTerms, LinearTerms

CHECKS = (
    "no archive member leaves the upload's folder; nothing was unpickled",
    "every config key is served or without effect",
    "the config's targets and the tensors name the same modules",
    "every tensor has the shape that the base model and the rank demand",
    "every value is finite",
)

_DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "I64": "int64",
}


class Passport(BaseModel):
    """What `GET /adapters/{name}` answers.

    `version` is the content digest. `rank` and `scaling` are the largest, 0
    without low-rank factors; `ranks` and `scalings` list all when modules
    differ. `target_modules` are the modules with factors (all that change, if
    none has), `num_modules` counts all that change. `features` names what the
    adapter does beside A and B. `bytes` is the size of the weights file.
    `chat_template` says that the adapter has one of its own, `end_tokens` what
    ends its answers besides the base's own. `fetched` is what the server brought from the Hub
    because a request named it, and may remove to make room.
    `self_check` is the largest relative difference between a layer's delta as
    it is served and in double precision, on a probe batch. `checks` lists what
    held for this upload, `notes` what the uploader should know,
    `ignored_files` what the upload held beside the adapter.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: str
    kind: str
    rank: int
    ranks: list[int] | None = None
    scaling: float
    scalings: list[float] | None = None
    target_modules: list[str]
    num_modules: int
    num_parameters: int
    features: list[str]
    bytes: int
    dtype: str
    base_model: str | None
    created_at: datetime
    card: TaskCard | None = None
    chat_template: bool = False
    end_tokens: list[str | int] = []
    fetched: bool = False
    self_check: float
    checks: list[str]
    notes: list[str]
    ignored_files: list[str]


@dataclass(frozen=True, slots=True)
class Publication:
    """The outcome of an upload; `created` is False if the name had this content already."""

    passport: Passport
    created: bool


def write_passport(
    *,
    name: str,
    version: str,
    created_at: datetime,
    folder: Path,
    kind: str,
    base_model: str | None,
    terms: AdapterTerms,
    self_check: float,
    dtype: str,
    card: TaskCard | None,
    chat: ChatFormat | None,
    notes: Iterable[str],
    ignored_files: Iterable[str],
) -> Passport:
    """Describe an adapter that passed every check; `dtype` is the one it is served in."""
    changed: dict[str, LinearTerms | EmbeddingTerms] = {**terms.linears, **terms.embeddings}
    factored = {path: term for path, term in changed.items() if term.rank}
    ranks = sorted({term.rank for term in factored.values()}) or [0]
    scalings = sorted({term.scaling for term in factored.values()}) or [0.0]
    paths = {*changed, *terms.overrides}
    chat = chat or ChatFormat()
    weights = folder / WEIGHTS_FILE
    entries = read_header(weights)
    dtypes = sorted({entry.dtype for entry in entries.values()})
    return Passport(
        name=name,
        version=version,
        kind=kind,
        rank=ranks[-1],
        ranks=ranks if len(ranks) > 1 else None,
        scaling=scalings[-1],
        scalings=scalings if len(scalings) > 1 else None,
        target_modules=sorted({path.rsplit(".", 1)[-1] for path in factored or paths}),
        num_modules=len(paths),
        num_parameters=sum(math.prod(entry.shape) for entry in entries.values()),
        features=find_features(terms),
        bytes=weights.stat().st_size,
        dtype=", ".join(_DTYPE_NAMES.get(dtype, dtype) for dtype in dtypes),
        base_model=base_model,
        created_at=created_at,
        card=card,
        chat_template=chat.template is not None,
        end_tokens=[*chat.end_tokens, *chat.end_ids],
        self_check=self_check,
        checks=[*CHECKS, _self_check_line(self_check, dtype)],
        notes=list(notes),
        ignored_files=list(ignored_files),
    )


def find_features(terms: AdapterTerms) -> list[str]:
    """What an adapter does beside adding B·A, in a fixed order."""
    linears = terms.linears.values()
    found = {
        "bias": any(term.bias is not None for term in linears),
        "scale": any(term.scale is not None for term in linears),
        "dense": any(term.dense is not None for term in linears),
        "embedding": bool(terms.embeddings),
        "override": bool(terms.overrides),
        "prompt": terms.prompt is not None,
        "invocation": bool(terms.invocation_ids),
    }
    return [feature for feature, present in found.items() if present]


def _self_check_line(difference: float, dtype: str) -> str:
    return (
        f"on a probe batch the deltas in {dtype} differ from those in double precision "
        f"by at most {difference:.1e} of the largest"
    )
