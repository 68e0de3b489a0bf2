"""The answers of `/health`, `/ready` and `/info`."""

from typing import Literal

from dynamic_lora_server.schemas._base import Answer


class Health(Answer):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Ready(Answer):
    """The model is loaded."""

    status: Literal["ready"] = "ready"
    model_id: str
    num_adapters: int


class Info(Answer):
    """What is served, under TGI's names where it has one.

    `model_origin` is a line on where the base's weights come from.
    """

    model_id: str
    model_origin: str
    model_dtype: str
    model_device_type: str
    max_input_tokens: int
    max_total_tokens: int
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    version: str
    num_adapters: int
