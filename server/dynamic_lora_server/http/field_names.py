"""What the requests of each route call the fields that errors name."""

import dataclasses
import re
from collections.abc import Mapping

from dynamic_lora_server.generation import SamplingParams

_OPENAI: Mapping[str, str] = {
    "adapter": "model",
    "inputs": "prompt",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}
_TOKENIZE: Mapping[str, str] = {"adapter": "model"}
_OF_PATH: Mapping[str, Mapping[str, str]] = {
    "/v1/chat/completions": {**_OPENAI, "inputs": "messages"},
    "/v1/responses": {
        **_OPENAI,
        "inputs": "input",
        "messages": "input",
        "max_new_tokens": "max_output_tokens",
    },
    "/tokenize": _TOKENIZE,
    "/detokenize": _TOKENIZE,
}
# A chat's tools have in an object of its own what those of a response have beside their type.
_OF_FUNCTION = re.compile(r"(tools\.\d+|tool_choice)\.function\b")
_GENERATE_PATHS = ("/", "/generate", "/generate_stream")
# What these have in `parameters`, of the names that errors have for it.
_PARAMETERS = frozenset({*(one.name for one in dataclasses.fields(SamplingParams)), "n", "stop"})


def field_of(path: str, field: str) -> str:
    """What the requests of a path call a field."""
    if path in _GENERATE_PATHS:
        return f"parameters.{field}" if field in _PARAMETERS else field
    if path == "/v1/responses":
        field = _OF_FUNCTION.sub(r"\1", field)
    names = _OF_PATH.get(path, _OPENAI if path.startswith("/v1/") else {})
    return names.get(field, field)
