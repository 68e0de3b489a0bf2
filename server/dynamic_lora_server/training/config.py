"""What one training run is asked to do: a YAML file, checked whole before any work starts."""

from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from dynamic_lora_adapters.files.card import PLACEHOLDER, CardExample, CardParameters
from dynamic_lora_server.base.base_model import DEFAULT_BASE
from dynamic_lora_server.training.errors import TrainingConfigError


class _Strict(BaseModel):
    """Immutable, and an unknown key is an error rather than ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ConllDataset(_Strict):
    """`token<TAB>tag` per line in BIO, a blank line between sentences.

    The answer is the sentence's entities as a JSON list. `keep_empty` is the share of
    entity-free sentences that training keeps, drawn with `sample_seed`: where they
    dominate, a model learns to answer `[]` too often.
    """

    kind: Literal["conll"]
    train: str
    dev: str | None = None
    keep_empty: float = Field(default=1.0, ge=0, le=1)
    sample_seed: int = 0


class TsvDataset(_Strict):
    """`sentence<TAB>label` per line; `labels` maps each label in the file to its answer.

    A first line that says `sentence<TAB>label` is a header.
    """

    kind: Literal["tsv"]
    train: str
    dev: str | None = None
    labels: dict[str, str] = Field(min_length=2)


class E2ECsvDataset(_Strict):
    """CSV with the columns `mr` and `ref`, one row per reference.

    One file holds both splits: `held_out` is the share of meaning representations
    (never of rows) kept for the dev split, drawn with `split_seed`; 0 trains on all.
    """

    kind: Literal["e2e-csv"]
    train: str
    held_out: float = Field(default=0.2, ge=0, lt=1)
    split_seed: int = 0


class JsonlDataset(_Strict):
    """One JSON object per line, with exactly the string keys `input` and `output`."""

    kind: Literal["jsonl"]
    train: str
    dev: str | None = None


DatasetConfig = Annotated[
    ConllDataset | TsvDataset | E2ECsvDataset | JsonlDataset, Field(discriminator="kind")
]


class LoraSettings(_Strict):
    """The adapter's shape, in PEFT's terms."""

    r: int = Field(default=8, ge=1)
    alpha: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


class OptimizerSettings(_Strict):
    """AdamW, its schedule, and LoRA+ where `loraplus_ratio` is set.

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354) trains B at `loraplus_ratio` times
    the learning rate of A; on embeddings both factors learn at `lr`.
    """

    lr: float = Field(default=3e-4, gt=0)
    loraplus_ratio: float | None = Field(default=None, ge=1)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)


class CardSettings(_Strict):
    """The fields of the task card that training cannot know."""

    description: str = Field(min_length=1)
    dataset: str
    license: str
    attribution: str
    parameters: CardParameters = CardParameters()
    example: CardExample


class TrainingConfig(_Strict):
    """One adapter's recipe. `output` is relative to the folder the command runs in.

    `share_prompts` trains all answers to one input in one row, so that a long prompt
    with many references is computed once. `batch_size` counts rows, of which at most
    `micro_batch_size` are computed at once. A row, prompt and answers together, has at most
    `max_length` tokens.

    `base` is a folder or a model id of the Hub; without it, the embedded default. With
    `chat_template` the adapter's chats are prompts of this template too.
    """

    base: str | None = None
    dataset: DatasetConfig
    prompt_template: str
    answer_prefix: str = " "
    chat_template: bool = True
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    batch_size: int = Field(default=16, ge=1)
    micro_batch_size: int | None = Field(default=None, ge=1)
    epochs: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=-(2**63), lt=2**64)  # what torch takes
    max_length: int = Field(default=512, ge=2)
    share_prompts: bool = False
    output: str
    card: CardSettings

    @property
    def base_name(self) -> str:
        """What the adapter's files call its base model."""
        return DEFAULT_BASE if self.base is None else self.base

    @property
    def rows_at_once(self) -> int:
        """How many rows' activations are in memory together."""
        return self.micro_batch_size or self.batch_size

    @model_validator(mode="after")
    def _one_placeholder(self) -> Self:
        if self.prompt_template.count(PLACEHOLDER) != 1:
            raise ValueError(f"prompt_template must hold {PLACEHOLDER} exactly once")
        return self

    def render(self, text: str) -> str:
        """The prompt for one input, as the server renders it from the task card."""
        return self.prompt_template.replace(PLACEHOLDER, text)


def load_config(path: Path) -> TrainingConfig:
    """Read and check a recipe; raises `TrainingConfigError` naming each field at fault."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: 2024-02-30, no UTF-8
        raise TrainingConfigError(f"cannot read the recipe {path}: {error}") from error
    try:
        return TrainingConfig.model_validate(loaded)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'recipe'}: {_reason(fault)}"
            for fault in error.errors()
        )
        raise TrainingConfigError(f"{path}: {faults}") from error


def _reason(fault: ErrorDetails) -> str:
    if fault["type"] == "extra_forbidden":
        return "is not a key of a recipe"
    return fault["msg"]
