"""The task card: an optional `task.json` beside PEFT's files.

With it a caller sends the bare input and gets the task's answer; without it the
prompt goes to the model as it is.
"""

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dynamic_lora_adapters.errors import InvalidAdapter
from dynamic_lora_adapters.files.json_file import read_json_object

CARD_FILE = "task.json"
PLACEHOLDER = "{input}"
MAX_STOP_STRINGS = 32

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class CardParameters(_Strict):
    """Defaults for `parameters` of /generate; what a request says itself wins.

    The bounds are those of a request: a card that no request could use is no card.
    """

    max_new_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    temperature: _Finite | None = Field(default=None, ge=0, le=100)
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: _Finite | None = Field(default=None, ge=0.01, le=100)
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    stop: list[Annotated[str, Field(min_length=1)]] | None = Field(
        default=None, max_length=MAX_STOP_STRINGS
    )
    do_sample: bool | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    ignore_eos: bool | None = None


class CardExample(_Strict):
    """One input and the answer to expect."""

    input: str
    output: str


class TaskCard(_Strict):
    """What an adapter is for and how to ask it; every field is optional.

    `prompt_template` holds `{input}` exactly once; all other braces are plain
    text. `metrics` are the author's own figures, by name.
    """

    description: str | None = None
    prompt_template: str | None = None
    parameters: CardParameters = Field(default_factory=CardParameters)
    example: CardExample | None = None
    base_model: str | None = None
    metrics: dict[str, _Finite] = Field(default_factory=dict)
    dataset: str | None = None
    license: str | None = None
    attribution: str | None = None

    @field_validator("prompt_template")
    @classmethod
    def _one_placeholder(cls, template: str | None) -> str | None:
        if template is not None and template.count(PLACEHOLDER) != 1:
            raise ValueError(
                f"must hold {PLACEHOLDER} exactly once, not {template.count(PLACEHOLDER)} times"
            )
        return template

    def render(self, text: str) -> str:
        """The prompt for `text`: the template with the input in its place, or `text` itself."""
        if self.prompt_template is None:
            return text
        return self.prompt_template.replace(PLACEHOLDER, text)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read `task.json` from an adapter's folder; None when it has none.

        Raises `InvalidAdapter` naming the field at fault.
        """
        path = folder / CARD_FILE
        if not path.exists():
            return None
        content = read_json_object(path)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise InvalidAdapter(
                f"{CARD_FILE}: {place}: {first['msg']}.", field=f"{CARD_FILE}: {place}"
            ) from None
