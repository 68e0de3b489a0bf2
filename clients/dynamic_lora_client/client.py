"""The synchronous client."""

import os
import time
from collections.abc import Generator, Mapping
from types import TracebackType
from typing import Self, TypeVar, Unpack

import httpx

from dynamic_lora_client import protocol
from dynamic_lora_client.config import DEFAULT_MAX_CONNECTIONS, DEFAULT_URL, ClientConfig
from dynamic_lora_client.files import Progress, UploadFiles
from dynamic_lora_client.generations import GenerationStream
from dynamic_lora_client.retry import RetryBudget, RetryPolicy
from dynamic_lora_client.transport import (
    environment_errors,
    httpx_options,
    stream_errors,
    transport_errors,
)
from dynamic_lora_client.types import (
    Adapter,
    AdapterList,
    Composition,
    Generation,
    Parameters,
    Token,
    Upload,
    WeightedAdapters,
)

T = TypeVar("T")


class Client:
    """Talks to one server over kept connections; safe to share between threads.

    Every method raises the errors of `dynamic_lora_client.errors`. Answers 429
    and 503 are retried as `retry` says. At most `max_connections` calls are on
    their way at once, the others wait. `transport` replaces the network, as in
    httpx, and has limits of its own.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        connect_timeout: float = 5.0,
        read_timeout: float = 300.0,
        max_connections: int = DEFAULT_MAX_CONNECTIONS,
        api_key: str | None = None,
        retry: RetryPolicy | None = None,
        headers: Mapping[str, str] | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._config = ClientConfig(
            url=url,
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
            max_connections=max_connections,
            api_key=api_key,
            retry=retry or RetryPolicy(),
            headers=headers or {},
        )
        with environment_errors():
            options = httpx_options(self._config, transport, httpx.HTTPTransport)
            self._http = httpx.Client(**options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def generate(
        self,
        inputs: str,
        *,
        adapter: str | None = None,
        adapters: WeightedAdapters | None = None,
        raw: bool = False,
        details: bool = True,
        **parameters: Unpack[Parameters],
    ) -> Generation:
        """Generate with an adapter, or with the base model where none is named.

        `adapter` is a name or a sum such as `ner*0.7+tone*0.3`; `adapters` is a
        sum as pairs. `raw` sends the text as the prompt itself, past the
        adapter's template. Without `details` the answer holds the text alone.
        """
        return self._call(
            protocol.generate(
                inputs,
                adapter=adapter,
                adapters=adapters,
                raw=raw,
                details=details,
                parameters=parameters,
            )
        )

    def stream(
        self,
        inputs: str,
        *,
        adapter: str | None = None,
        adapters: WeightedAdapters | None = None,
        raw: bool = False,
        **parameters: Unpack[Parameters],
    ) -> Generator[Token | Generation, None, None]:
        """Generate token by token; the last item is the whole Generation.

        `adapter`, `adapters` and `raw` are those of `generate`.
        The request goes out with the first item asked for. Closing the
        generator closes the connection, which frees the place on the server.
        Raises StreamBroken where the stream ends early; it is never retried.
        """
        call = protocol.stream(
            inputs, adapter=adapter, adapters=adapters, raw=raw, parameters=parameters
        )
        return self._stream(call)

    def upload(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        force: bool = False,
        on_progress: Progress | None = None,
    ) -> Upload:
        """Upload a PEFT directory, or an archive of one, under a name.

        The files are read from disk as they are sent. `force` takes an adapter
        that names another base model. See UploadFiles for what is sent.
        """
        files = UploadFiles.find(path)
        return self._call(protocol.upload(name, files, force=force, on_progress=on_progress))

    def fetch(self, name: str, source: str, *, force: bool = False) -> Upload:
        """Have the server take an adapter from where it finds it, under a name.

        `source` is `hf://organisation/repository`, with `@revision` if need be, or what
        lies on the server's disk below an `--adapter-root`. `force` is that of `upload`.
        """
        return self._call(protocol.fetch(name, source, force=force))

    def adapters(self) -> AdapterList:
        """All adapters of the server; `unreadable` of the list are those it cannot serve."""
        return self._call(protocol.list_adapters())

    def adapter(self, name: str) -> Adapter:
        """One adapter. Raises AdapterNotFound."""
        return self._call(protocol.get_adapter(name))

    def delete(self, name: str) -> None:
        """Delete an adapter. Raises AdapterNotFound."""
        self._call(protocol.delete_adapter(name))

    def compositions(self) -> list[Composition]:
        """All saved compositions of the server."""
        return self._call(protocol.list_compositions())

    def composition(self, name: str) -> Composition:
        """One saved composition. Raises NotFound."""
        return self._call(protocol.get_composition(name))

    def save_composition(self, name: str, text: str) -> Composition:
        """Give a sum such as `ner*0.7+tone*0.3` a name that works like an adapter's."""
        return self._call(protocol.save_composition(name, text))

    def delete_composition(self, name: str) -> None:
        """Delete a saved composition; its adapters stay. Raises NotFound."""
        self._call(protocol.delete_composition(name))

    def health(self) -> bool:
        """Whether the server's process is alive."""
        return self._call(protocol.probe("/health"), RetryPolicy(max_attempts=1))

    def ready(self) -> bool:
        """Whether the server can generate: its model is loaded."""
        return self._call(protocol.probe("/ready"), RetryPolicy(max_attempts=1))

    def _call(self, call: protocol.Call[T], retry: RetryPolicy | None = None) -> T:
        budget = RetryBudget(retry or self._config.retry)
        while True:
            with transport_errors(self._config, self._http), call.arguments() as arguments:
                response = self._http.request(**arguments)
            wait = budget.spend(response)
            if wait is None:
                return call.finish(response)
            time.sleep(wait)

    def _stream(
        self, call: protocol.Call[GenerationStream]
    ) -> Generator[Token | Generation, None, None]:
        response = self._open(call)
        try:
            reader = call.read(response)
            with stream_errors(self._config):
                for chunk in response.iter_bytes():
                    yield from reader.feed(chunk)
            reader.close()
        finally:
            response.close()

    def _open(self, call: protocol.Call[GenerationStream]) -> httpx.Response:
        budget = RetryBudget(self._config.retry)
        while True:
            with transport_errors(self._config, self._http), call.arguments() as arguments:
                request = self._http.build_request(**arguments)
                response = self._http.send(request, stream=True)
                if response.is_success:
                    return response
                response.read()
            wait = budget.spend(response)
            if wait is None:
                call.check(response)
            else:
                time.sleep(wait)
