"""Requests built and answers read, without I/O: both clients send what this module makes."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from dynamic_lora_client.errors import InvalidArgument, InvalidResponse
from dynamic_lora_client.files import Progress, UploadFiles
from dynamic_lora_client.generations import GenerationStream, read_generation
from dynamic_lora_client.problems import to_error
from dynamic_lora_client.resources import (
    read_adapter,
    read_adapters,
    read_composition,
    read_compositions,
)
from dynamic_lora_client.types import (
    Adapter,
    AdapterList,
    Composition,
    Generation,
    Parameters,
    Upload,
    WeightedAdapters,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """One exchange: what to send, and how to read a successful answer.

    `accepted` lists error statuses that `read` takes as an answer.
    """

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    params: Mapping[str, str] = field(default_factory=dict)
    json: Mapping[str, Any] | None = None
    form: Mapping[str, str] = field(default_factory=dict)
    files: UploadFiles | None = None
    on_progress: Progress | None = None
    accepted: tuple[int, ...] = ()

    @contextmanager
    def arguments(self) -> Iterator[dict[str, Any]]:
        """Arguments for httpx's `build_request`; files are open within the block.

        Raises InvalidArgument for what cannot be sent.
        """
        for text in self._texts():
            _check_text(text)
        arguments: dict[str, Any] = {
            "method": self.method,
            "url": self.path,
            "params": dict(self.params),
        }
        if self.json is not None:
            arguments["content"] = _encode(self.json)
            arguments["headers"] = {"content-type": "application/json"}
        if self.files is None:
            yield arguments
            return
        with self.files.open(self.on_progress) as parts:
            yield arguments | {"data": dict(self.form), "files": parts}

    def _texts(self) -> Iterator[str]:
        """What goes out as UTF-8; JSON is ASCII."""
        yield from (*self.params.values(), *self.form.values())
        if self.files is not None:
            yield from (path.name for path in self.files.paths)

    def finish(self, response: httpx.Response) -> T:
        """The result of an answer that was read whole. Raises ApiError, InvalidResponse."""
        self.check(response)
        return self.read(response)

    def check(self, response: httpx.Response) -> None:
        """Raise ApiError for an error status, InvalidResponse for one that is no answer."""
        if response.status_code in self.accepted:
            return
        if response.status_code >= HTTPStatus.BAD_REQUEST:
            raise to_error(response)
        if not response.is_success:
            raise InvalidResponse(
                f"The server answered with status {response.status_code}.",
                fix="Check its URL: nothing of this API redirects.",
            )


def _check_text(text: str) -> None:
    """A lone surrogate cannot be sent: so Python reads a command line that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"{text!r} cannot be written as UTF-8.") from None


def _encode(values: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(values, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"The request cannot be written as JSON: {error}.") from None


def generate(
    inputs: str,
    *,
    adapter: str | None,
    adapters: WeightedAdapters | None,
    raw: bool,
    details: bool,
    parameters: Parameters,
) -> Call[Generation]:
    """One whole generation."""
    return Call(
        method="POST",
        path="/generate",
        params=_adapter_query(adapter),
        json=_generate_body(
            inputs, adapters=adapters, raw=raw, details=details, parameters=parameters
        ),
        read=read_generation,
    )


def stream(
    inputs: str,
    *,
    adapter: str | None,
    adapters: WeightedAdapters | None,
    raw: bool,
    parameters: Parameters,
) -> Call[GenerationStream]:
    """A generation token by token; `read` gives the reader of its body."""
    return Call(
        method="POST",
        path="/generate_stream",
        params=_adapter_query(adapter),
        json=_generate_body(
            inputs, adapters=adapters, raw=raw, details=True, parameters=parameters
        ),
        read=GenerationStream,
    )


def upload(
    name: str, files: UploadFiles, *, force: bool, on_progress: Progress | None
) -> Call[Upload]:
    """Upload an adapter under a name."""
    return Call(
        method="POST",
        path="/adapters",
        form={"name": name} | ({"force": "true"} if force else {}),
        files=files,
        on_progress=on_progress,
        read=_read_upload,
    )


def fetch(name: str, source: str, *, force: bool) -> Call[Upload]:
    """Have the server take an adapter from where it finds it."""
    return Call(
        method="POST",
        path="/adapters",
        json={"name": name, "source": source} | ({"force": True} if force else {}),
        read=_read_upload,
    )


def list_adapters() -> Call[AdapterList]:
    """All adapters."""
    return Call(method="GET", path="/adapters", read=read_adapters)


def get_adapter(name: str) -> Call[Adapter]:
    """One adapter."""
    return Call(
        method="GET",
        path=_path("adapters", name),
        read=read_adapter,
    )


def delete_adapter(name: str) -> Call[None]:
    """Delete one adapter."""
    return Call(method="DELETE", path=_path("adapters", name), read=lambda _: None)


def list_compositions() -> Call[list[Composition]]:
    """All saved compositions."""
    return Call(method="GET", path="/compositions", read=read_compositions)


def get_composition(name: str) -> Call[Composition]:
    """One saved composition."""
    return Call(method="GET", path=_path("compositions", name), read=read_composition)


def save_composition(name: str, text: str) -> Call[Composition]:
    """Save a composition under a name."""
    return Call(
        method="PUT",
        path=_path("compositions", name),
        json={"adapter": text},
        read=read_composition,
    )


def delete_composition(name: str) -> Call[None]:
    """Delete one saved composition."""
    return Call(method="DELETE", path=_path("compositions", name), read=lambda _: None)


def probe(path: str) -> Call[bool]:
    """Whether `path` answers with success; 503 is the answer no."""
    return Call(
        method="GET",
        path=path,
        accepted=(HTTPStatus.SERVICE_UNAVAILABLE,),
        read=lambda response: response.is_success,
    )


def _read_upload(response: httpx.Response) -> Upload:
    return Upload(
        adapter=read_adapter(response), created=response.status_code == HTTPStatus.CREATED
    )


def _adapter_query(adapter: str | None) -> dict[str, str]:
    return {} if adapter is None else {"adapter": adapter}


def _path(resource: str, name: str) -> str:
    if not {"", ".", ".."}.isdisjoint(name.split("/")):  # another path, to who resolves these
        raise InvalidArgument(f"{name!r} is not the name of an adapter or a composition.")
    _check_text(name)
    return f"/{resource}/{quote(name)}"


def _generate_body(
    inputs: str,
    *,
    adapters: WeightedAdapters | None,
    raw: bool,
    details: bool,
    parameters: Parameters,
) -> dict[str, Any]:
    unknown = sorted(parameters.keys() - Parameters.__optional_keys__)
    if unknown:
        raise InvalidArgument(
            f"There is no generation parameter {unknown[0]!r}.",
            fix=f"Known ones: {', '.join(sorted(Parameters.__optional_keys__))}.",
        )
    if isinstance(parameters.get("stop"), str):
        raise InvalidArgument("stop must be a list of strings, not one string.")
    body: dict[str, Any] = {"inputs": inputs, "parameters": {**parameters, "details": details}}
    if adapters is not None:
        body["adapters"] = [{"name": name, "weight": weight} for name, weight in adapters]
    return body | ({"raw": True} if raw else {})
