"""The bodies and answers of `/tokenize` and `/detokenize`, in TGI's and in vLLM's shapes."""

from typing import Annotated

from pydantic import ConfigDict, Discriminator, Field, RootModel, Tag

from dynamic_lora_server.schemas._base import (
    Answer,
    JsonObject,
    NonEmptyText,
    Text,
    Unset,
    UnsetOrFalse,
    Wire,
    null_is,
)
from dynamic_lora_server.schemas.generate import TokenIds
from dynamic_lora_server.schemas.openai import Messages
from dynamic_lora_server.schemas.tools import TemplateRequest

_Yes = Annotated[bool, null_is(True, bool)]
_MODEL = (
    "Task name of an adapter, a sum such as `ner*0.7+tone*0.3`, or a name of the base model, which "
    "is also meant where there is none."
)


class TokenizeInputs(Wire):
    """A text whose tokens are wanted with their places in it: TGI's and LoRAX's form."""

    inputs: Text
    add_special_tokens: _Yes = Field(
        default=True, description="Also the tokens that a prompt gets besides its text."
    )


class TokenizePrompt(Wire):
    """A text whose tokens are counted: vLLM's form."""

    model: NonEmptyText | None = Field(default=None, description=_MODEL)
    prompt: Text
    add_special_tokens: _Yes = Field(
        default=True, description="Also the tokens that a prompt gets besides its text."
    )
    return_token_strs: UnsetOrFalse = None


class TokenizeMessages(TemplateRequest):
    """A conversation whose tokens are counted, as `/v1/chat/completions` sends them to the model:
    vLLM's form."""

    model: NonEmptyText | None = Field(default=None, description=_MODEL)
    messages: Messages
    chat_template_kwargs: JsonObject | None = Field(
        default=None, description="Variables for the chat template, such as `enable_thinking`."
    )
    add_special_tokens: UnsetOrFalse = None
    chat_template: Unset = None
    media_io_kwargs: Unset = None
    mm_processor_kwargs: Unset = None
    return_token_strs: UnsetOrFalse = None


_FORM_OF = {
    "inputs": "TokenizeInputs",
    "prompt": "TokenizePrompt",
    "messages": "TokenizeMessages",
}
FORMS = frozenset(_FORM_OF.values())  # as errors have them in the places that they name


def _form(body: object) -> str | None:
    """Which form a body has: the field that no other form has says so."""
    fields = body if isinstance(body, dict) else {}
    return next((form for field, form in _FORM_OF.items() if field in fields), None)


class TokenizeRequest(
    RootModel[
        Annotated[
            Annotated[TokenizeInputs, Tag("TokenizeInputs")]
            | Annotated[TokenizePrompt, Tag("TokenizePrompt")]
            | Annotated[TokenizeMessages, Tag("TokenizeMessages")],
            Discriminator(
                _form,
                custom_error_type="form_not_found",
                custom_error_message="needs inputs, prompt or messages",
            ),
        ]
    ]
):
    """The body of `POST /tokenize`: which of `inputs`, `prompt` and `messages` is there says how
    it is answered."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"inputs": "The capital of France"},
                {"model": "base", "messages": [{"role": "user", "content": "Name three rivers."}]},
            ]
        }
    )


class SimpleToken(Answer):
    """A token and where it stands: `text` is `inputs` from character `start` up to `stop`.

    A token that is not of the text, such as one that begins every prompt, has 0 and 0.
    """

    id: int
    text: str
    start: int
    stop: int


class TokenCount(Answer):
    """How many tokens there are, which, and how many the model takes, its answer included."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeRequest(Wire):
    """The body of `POST /detokenize`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [504, 3575]}]})

    model: NonEmptyText | None = Field(default=None, description=_MODEL)
    tokens: TokenIds


class Detokenized(Answer):
    """The answer of `POST /detokenize`; special tokens read as their names."""

    prompt: str
