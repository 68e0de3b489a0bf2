"""The asynchronous client: the same methods as `Client`, awaited."""

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping
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


class AsyncClient:
    """Talks to one server over kept connections; safe to share between tasks.

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
        transport: httpx.AsyncBaseTransport | None = None,
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
            options = httpx_options(self._config, transport, httpx.AsyncHTTPTransport)
            self._http = httpx.AsyncClient(**options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def generate(
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
        return await self._call(
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
    ) -> AsyncGenerator[Token | Generation, None]:
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

    async def upload(
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
        return await self._call(protocol.upload(name, files, force=force, on_progress=on_progress))

    async def fetch(self, name: str, source: str, *, force: bool = False) -> Upload:
        """Have the server take an adapter from where it finds it, under a name.

        `source` is `hf://organisation/repository`, with `@revision` if need be, or what
        lies on the server's disk below an `--adapter-root`. `force` is that of `upload`.
        """
        return await self._call(protocol.fetch(name, source, force=force))

    async def adapters(self) -> AdapterList:
        """All adapters of the server; `unreadable` of the list are those it cannot serve."""
        return await self._call(protocol.list_adapters())

    async def adapter(self, name: str) -> Adapter:
        """One adapter. Raises AdapterNotFound."""
        return await self._call(protocol.get_adapter(name))

    async def delete(self, name: str) -> None:
        """Delete an adapter. Raises AdapterNotFound."""
        await self._call(protocol.delete_adapter(name))

    async def compositions(self) -> list[Composition]:
        """All saved compositions of the server."""
        return await self._call(protocol.list_compositions())

    async def composition(self, name: str) -> Composition:
        """One saved composition. Raises NotFound."""
        return await self._call(protocol.get_composition(name))

    async def save_composition(self, name: str, text: str) -> Composition:
        """Give a sum such as `ner*0.7+tone*0.3` a name that works like an adapter's."""
        return await self._call(protocol.save_composition(name, text))

    async def delete_composition(self, name: str) -> None:
        """Delete a saved composition; its adapters stay. Raises NotFound."""
        await self._call(protocol.delete_composition(name))

    async def health(self) -> bool:
        """Whether the server's process is alive."""
        return await self._call(protocol.probe("/health"), RetryPolicy(max_attempts=1))

    async def ready(self) -> bool:
        """Whether the server can generate: its model is loaded."""
        return await self._call(protocol.probe("/ready"), RetryPolicy(max_attempts=1))

    async def _call(self, call: protocol.Call[T], retry: RetryPolicy | None = None) -> T:
        budget = RetryBudget(retry or self._config.retry)
        while True:
            with transport_errors(self._config, self._http), call.arguments() as arguments:
                response = await self._http.request(**arguments)
            wait = budget.spend(response)
            if wait is None:
                return call.finish(response)
            await asyncio.sleep(wait)

    async def _stream(
        self, call: protocol.Call[GenerationStream]
    ) -> AsyncGenerator[Token | Generation, None]:
        response = await self._open(call)
        try:
            reader = call.read(response)
            with stream_errors(self._config):
                async for chunk in response.aiter_bytes():
                    for event in reader.feed(chunk):
                        yield event
            reader.close()
        finally:
            await response.aclose()

    async def _open(self, call: protocol.Call[GenerationStream]) -> httpx.Response:
        budget = RetryBudget(self._config.retry)
        while True:
            with transport_errors(self._config, self._http), call.arguments() as arguments:
                request = self._http.build_request(**arguments)
                response = await self._http.send(request, stream=True)
                if response.is_success:
                    return response
                await response.aread()
            wait = budget.spend(response)
            if wait is None:
                call.check(response)
            else:
                await asyncio.sleep(wait)
