"""The passport: what the server knows about one adapter and what it checked."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dynamic_lora_adapters.card import TaskCard
from dynamic_lora_adapters.spec import LoraSpec
from dynamic_lora_adapters.weights import WEIGHTS_FILE, LoraFactors, read_header

CHECKS = (
    "no archive member leaves the upload's folder; nothing was unpickled",
    "every config key is served or without effect",
    "the config's targets and the tensors name the same modules",
    "every tensor has the shape that the base model and the rank demand",
    "every value is finite",
)

_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Passport(BaseModel):
    """What `GET /adapters/{name}` answers.

    `version` is the content digest. `rank` and `scaling` are the largest;
    `ranks` and `scalings` list all when modules differ. `bytes` is the size of
    the weights file. `checks` lists what held for this upload, `notes` what the
    uploader should know, `ignored_files` what the upload held beside the adapter.
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
    bytes: int
    dtype: str
    base_model: str | None
    created_at: datetime
    card: TaskCard | None = None
    checks: list[str]
    notes: list[str]
    ignored_files: list[str]


def write_passport(
    *,
    name: str,
    version: str,
    created_at: datetime,
    folder: Path,
    spec: LoraSpec,
    factors: Mapping[str, LoraFactors],
    card: TaskCard | None,
    notes: Iterable[str],
    ignored_files: Iterable[str],
) -> Passport:
    """Describe an adapter that passed every check."""
    ranks = sorted({f.rank for f in factors.values()})
    scalings = sorted({f.scaling for f in factors.values()})
    weights = folder / WEIGHTS_FILE
    dtypes = sorted({entry.dtype for entry in read_header(weights).values()})
    return Passport(
        name=name,
        version=version,
        kind=spec.kind,
        rank=ranks[-1],
        ranks=ranks if len(ranks) > 1 else None,
        scaling=scalings[-1],
        scalings=scalings if len(scalings) > 1 else None,
        target_modules=sorted({path.rsplit(".", 1)[-1] for path in factors}),
        num_modules=len(factors),
        num_parameters=sum(f.a.numel() + f.b.numel() for f in factors.values()),
        bytes=weights.stat().st_size,
        dtype=", ".join(_DTYPE_NAMES[dtype] for dtype in dtypes),
        base_model=spec.base_model,
        created_at=created_at,
        card=card,
        checks=list(CHECKS),
        notes=list(notes),
        ignored_files=list(ignored_files),
    )
