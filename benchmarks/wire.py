"""How each kind of server is asked for a stream of tokens, and how its events are counted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.errors import RequestFailed
from benchmarks.workload import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one event brought: new tokens, and the server's own totals where it says them."""

    num_tokens: int = 0
    total_output_tokens: int | None = None
    total_prompt_tokens: int | None = None


class Wire(Protocol):
    """One kind of HTTP interface: no early end, a server-sent event stream."""

    @property
    def path(self) -> str:
        """The path that requests are posted to."""
        ...

    def body(self, request: Request) -> dict[str, Any]:
        """The JSON body of a request."""
        ...

    def params(self, request: Request) -> dict[str, str]:
        """The query of a request."""
        ...

    def read(self, event: Mapping[str, Any]) -> Delta:
        """Count one event. Raises RequestFailed where it reports an error."""
        ...


@dataclass(frozen=True, slots=True)
class DynamicLoraWire:
    """This project's `/generate_stream`. `names` are the adapters' by index."""

    names: Sequence[str]
    path: str = "/generate_stream"

    def body(self, request: Request) -> dict[str, Any]:
        """The body; `raw`, so that no adapter's template changes the prompt's length."""
        return {
            "inputs": request.prompt,
            "raw": True,
            "parameters": {
                "max_new_tokens": request.num_output_tokens,
                "ignore_eos": True,
                **request.sampling.parameters(),
            },
        }

    def params(self, request: Request) -> dict[str, str]:
        """The adapter's name."""
        return {} if request.adapter is None else {"adapter": self.names[request.adapter]}

    def read(self, event: Mapping[str, Any]) -> Delta:
        """One event is one token; the last has the total."""
        _refuse_error(event)
        details = event.get("details") or {}
        return Delta(
            num_tokens=1 if event.get("token") else 0,
            total_output_tokens=details.get("generated_tokens"),
        )


@dataclass(frozen=True, slots=True)
class OpenAIWire:
    """`/v1/completions` with `ignore_eos`, as vLLM and this project have it."""

    base: str
    names: Sequence[str]
    path: str = "/v1/completions"

    def body(self, request: Request) -> dict[str, Any]:
        """The body; the adapter is the model."""
        return {
            "model": self.base if request.adapter is None else self.names[request.adapter],
            "prompt": request.prompt,
            "max_tokens": request.num_output_tokens,
            **request.sampling.parameters(),
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def params(self, request: Request) -> dict[str, str]:  # noqa: ARG002 - the wire has none
        """No query."""
        return {}

    def read(self, event: Mapping[str, Any]) -> Delta:
        """One event with a choice is at least one token; the usage event has the totals."""
        _refuse_error(event)
        usage = event.get("usage") or {}
        return Delta(
            num_tokens=1 if event.get("choices") else 0,
            total_output_tokens=usage.get("completion_tokens"),
            total_prompt_tokens=usage.get("prompt_tokens"),
        )


@dataclass(frozen=True, slots=True)
class LlamaCppWire:
    """llama.cpp's `/completion`; its adapters are numbered in the order of its command line."""

    num_adapters: int
    path: str = "/completion"

    def body(self, request: Request) -> dict[str, Any]:
        """The body; every adapter is given a scale, 1 for the wanted one."""
        return {
            "prompt": request.prompt,
            "n_predict": request.num_output_tokens,
            **request.sampling.parameters(),
            "min_p": 0,  # its default is not 0
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
            "lora": [
                {"id": index, "scale": float(index == request.adapter)}
                for index in range(self.num_adapters)
            ],
        }

    def params(self, request: Request) -> dict[str, str]:  # noqa: ARG002 - the wire has none
        """No query."""
        return {}

    def read(self, event: Mapping[str, Any]) -> Delta:
        """One event before the last is one token; the last has the totals."""
        _refuse_error(event)
        if not event.get("stop"):
            return Delta(num_tokens=1)
        return Delta(
            total_output_tokens=event.get("tokens_predicted"),
            total_prompt_tokens=event.get("tokens_evaluated"),
        )


def _refuse_error(event: Mapping[str, Any]) -> None:
    if event.get("error"):
        raise RequestFailed(f"the stream reported: {event['error']}")
