"""What all wire models share: strict types, no unknown field, no NaN."""

from typing import Annotated, Any, Optional

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

# More than any object of a request has. Each unknown field is an error of its own.
_MAX_FIELDS = 200


class Wire(BaseModel):
    """A request body or part of one. Unknown fields and wrong types are refused by name.

    A list that may be long stops at its first item that is wrong (`fail_fast`).
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise ValueError(f"has {len(value)} fields, far more than there are")
        return value


def null_is(default: object, kind: Any) -> BeforeValidator:
    """Annotates a field of a kind: null is the same as leaving it out, which is `default`."""

    def fill(value: object) -> object:
        return default if value is None else value

    return BeforeValidator(fill, json_schema_input_type=Optional[kind])  # noqa: UP045


def _whole_characters(value: object) -> object:
    """As `_whole_text`, in an object and all lists and objects of it."""
    waiting = [value]
    while waiting:
        match one := waiting.pop():
            case str():
                _check_encodable(one)
            case list():
                waiting.extend(one)
            case dict():
                waiting.extend([*one, *one.values()])
    return value


def _whole_text(value: object) -> object:
    """JSON can escape half of a surrogate pair, as where a client cuts an emoji in two.

    No tokenizer takes such a text, and no answer can hold it. What is no text is refused as that,
    and not looked into: it may be a list of millions.
    """
    if isinstance(value, str):
        _check_encodable(value)
    return value


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"holds {half!r}, which is half of a character") from None


# What every text of a request is.
Text = Annotated[str, BeforeValidator(_whole_text)]
NonEmptyText = Annotated[str, Field(min_length=1), BeforeValidator(_whole_text)]
# An object of any content.
JsonObject = Annotated[dict[str, Any], BeforeValidator(_whole_characters)]


class Answer(BaseModel):
    """A response body or part of one."""

    model_config = ConfigDict(frozen=True)


class Neutral:
    """Annotates a field of a peer's API that is not served.

    Clients send such fields with values that ask for nothing: these pass, any
    other value is refused with the field's name, and with what to do about it.
    """

    def __init__(self, *values: object, fix: str = "leave it out") -> None:
        self.values = values
        self.fix = fix

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        del schema, handler
        return {"enum": list(self.values), "description": "Not served; these values pass."}

    def _check(self, value: object) -> object:
        # Without the type test, True would pass for 1 and False for 0.
        if not any(type(value) is type(one) and value == one for one in self.values):
            raise ValueError(f"is not supported by this server; {self.fix}")
        return value


Unset = Annotated[Any, Neutral(None)]
UnsetOrFalse = Annotated[Any, Neutral(None, False)]
UnsetOrOne = Annotated[Any, Neutral(None, 1, 1.0)]
UnsetOrEmptyList = Annotated[Any, Neutral(None, [])]
UnsetOrEmptyMap = Annotated[Any, Neutral(None, {})]
