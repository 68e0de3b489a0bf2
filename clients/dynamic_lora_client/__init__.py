"""Client for a Dynamic LoRA server: synchronous and asynchronous, on httpx alone."""

from dynamic_lora_client._version import __version__
from dynamic_lora_client.async_client import AsyncClient
from dynamic_lora_client.client import Client
from dynamic_lora_client.errors import (
    AccessDenied,
    AdapterNotFound,
    ApiError,
    BadRequest,
    Busy,
    DynamicLoraError,
    InvalidArgument,
    InvalidResponse,
    NotFound,
    Problem,
    ServerFault,
    StreamBroken,
    Timeout,
    TransportError,
    Unavailable,
)
from dynamic_lora_client.files import UploadFiles
from dynamic_lora_client.retry import RetryPolicy
from dynamic_lora_client.types import (
    Adapter,
    AdapterList,
    Composition,
    Continuation,
    Generation,
    Parameters,
    Token,
    UnreadableAdapter,
    Upload,
    WeightedAdapters,
)

__all__ = [
    "AccessDenied",
    "Adapter",
    "AdapterList",
    "AdapterNotFound",
    "ApiError",
    "AsyncClient",
    "BadRequest",
    "Busy",
    "Client",
    "Composition",
    "Continuation",
    "DynamicLoraError",
    "Generation",
    "InvalidArgument",
    "InvalidResponse",
    "NotFound",
    "Parameters",
    "Problem",
    "RetryPolicy",
    "ServerFault",
    "StreamBroken",
    "Timeout",
    "Token",
    "TransportError",
    "Unavailable",
    "UnreadableAdapter",
    "Upload",
    "UploadFiles",
    "WeightedAdapters",
    "__version__",
]
