"""The bodies and answers of `/adapters`."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from dynamic_lora_adapters.home.passport import Passport
from dynamic_lora_adapters.names import MAX_NAME
from dynamic_lora_server.schemas._base import (
    Answer,
    NonEmptyText,
    Text,
    Unset,
    UnsetOrFalse,
    Wire,
    null_is,
)


class AdapterSource(Wire):
    """The JSON body of `POST /adapters`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "ner", "source": "checkpoints/ner"}]}
    )

    name: Text
    source: NonEmptyText = Field(
        description="`hf://organisation/repository`, with `@revision` if need be, or a folder "
        "or archive below a folder that the server was started with (`--adapter-root`).",
    )
    force: Annotated[bool, null_is(False, bool)] = Field(
        default=False, description="Accept an adapter that names another base model."
    )


class LoadLoraAdapter(Wire):
    """The body of `POST /v1/load_lora_adapter`, vLLM's."""

    lora_name: Text
    lora_path: NonEmptyText = Field(
        description="A folder or archive below a folder that the server was started with "
        "(`--adapter-root`), or a repository of the Hub: `organisation/repository`, or as in "
        "`POST /adapters`."
    )
    load_inplace: Annotated[bool, null_is(False, bool)] = Field(
        default=False, description="Give other content to a name that is there."
    )
    is_3d_lora_weight: UnsetOrFalse = None


class UnloadLoraAdapter(Wire):
    """The body of `POST /v1/unload_lora_adapter`, vLLM's."""

    lora_name: Text
    lora_int_id: Unset = None


class Residency(Answer):
    """Where an adapter's weights are now: on the device, or on disk until a request needs them.

    `mode` is `merged` while the base weights hold the adapter; `num_merges`
    counts how often they came to.
    """

    tier: Literal["device", "disk"]
    mode: Literal["merged", "bypass"]
    num_merges: int


class Adapter(Passport):
    """An adapter's passport, and where its weights are now."""

    residency: Residency


class Modes(Answer):
    """What the choice between bypass and merged has done so far.

    `merged` is the version that the weights hold. The token counts are of rows
    that ran on weights holding their adapter, with a delta, and without an
    adapter. `drift` is the largest known error of a restored weight.
    """

    mode: Literal["auto", "bypass", "merged"]
    merged: str | None
    num_switches: int
    last_switch_ms: float
    num_merged_tokens: int
    num_bypass_tokens: int
    num_base_tokens: int
    drift: float


class UnreadableAdapter(Answer):
    """An adapter whose files are kept and cannot be served, with the `reason`.

    Another release stored it, or the system does not let the server read it. Its name stays its
    own until it is deleted.
    """

    name: str
    version: str
    reason: str


class AdapterList(Answer):
    """The answer of `GET /adapters`, by name."""

    adapters: list[Adapter]
    unreadable: list[UnreadableAdapter]
    modes: Modes


# What FastAPI cannot derive: one route with two kinds of body.
UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", "files"],
                    "additionalProperties": False,
                    "properties": {
                        "name": {"type": "string", "maxLength": MAX_NAME},
                        "force": {"type": "string", "enum": ["true", "false"]},
                        "files": {
                            "type": "array",
                            "minItems": 1,
                            "items": {"type": "string", "format": "binary"},
                            "description": "adapter_config.json, adapter_model.safetensors, "
                            "task.json, chat_template.jinja, tokenizer_config.json and "
                            "generation_config.json, or one .zip, .tar or .tar.gz of them.",
                        },
                    },
                }
            },
            "application/json": {"schema": AdapterSource.model_json_schema()},
        },
    }
}
