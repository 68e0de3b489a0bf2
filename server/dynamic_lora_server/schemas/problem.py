"""The error document of every route outside `/v1` (RFC 9457)."""

from pydantic import Field

from dynamic_lora_server.schemas._base import Answer


class Problem(Answer):
    """Why a request was refused, and what to do about it."""

    type: str = Field(examples=["/problems/adapter-not-found"])
    title: str
    status: int
    detail: str
    field: str | None = Field(
        default=None, description="Request field, config key, file or tensor."
    )
    fix: str | None = Field(default=None, description="What the caller can do, in one sentence.")
    error: str = Field(
        description="`detail` and `fix` in one, where clients of TGI and LoRAX read the message."
    )
    error_type: str | None = Field(
        default=None,
        description="`validation`, `overloaded` or `generation`, by which clients of TGI choose "
        "an exception.",
    )
    near: list[str] | None = Field(
        default=None, description="Adapter names close to the unknown one."
    )
