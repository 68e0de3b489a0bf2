"""httpx's exceptions turned into this package's."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from dynamic_lora_client.config import ClientConfig
from dynamic_lora_client.errors import StreamBroken, Timeout, TransportError


@contextmanager
def transport_errors(config: ClientConfig) -> Iterator[None]:
    """While sending, and while reading an answer whole."""
    try:
        yield
    except httpx.ConnectTimeout as error:
        message = f"{config.url} did not accept the connection in {config.connect_timeout:g} s."
        raise Timeout(message) from error
    except httpx.PoolTimeout as error:
        message = "No connection of the client's own became free in time; nothing was sent."
        raise Timeout(message, fix="Raise the limits of its transport.") from error
    except httpx.TimeoutException as error:
        raise Timeout(f"{config.url} was silent for {config.read_timeout:g} s.") from error
    except httpx.ConnectError as error:
        raise TransportError(
            f"Cannot connect to {config.url}: {_reason(error)}.",
            fix="Is the server running? Start it with 'dynamic-lora serve', or give another URL.",
        ) from error
    except httpx.RequestError as error:
        raise TransportError(f"The exchange with {config.url} failed: {_reason(error)}.") from error


@contextmanager
def stream_errors(config: ClientConfig) -> Iterator[None]:
    """While reading a stream of which a part may have been consumed."""
    try:
        yield
    except httpx.TimeoutException as error:
        message = f"The stream was silent for {config.read_timeout:g} s."
        raise StreamBroken(message) from error
    except httpx.RequestError as error:
        raise StreamBroken(f"The connection was lost in the stream: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__
