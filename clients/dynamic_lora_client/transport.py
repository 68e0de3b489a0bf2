"""What httpx is made with, and its exceptions turned into this package's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

import httpx

from dynamic_lora_client.config import ClientConfig
from dynamic_lora_client.errors import InvalidArgument, StreamBroken, Timeout, TransportError


def httpx_options(
    config: ClientConfig, transport: Any, network: Callable[..., Any]
) -> dict[str, Any]:
    """What an httpx client of `config` is made with: on `transport`, or on the network.

    `network` is httpx's own transport, which asks no proxy: no other machine reaches what
    listens on this one's loopback addresses. Elsewhere the environment's proxies hold.
    """
    if transport is None and _is_this_machine(config.url):
        transport = network(limits=config.limits)
    return {
        "base_url": config.url,
        "headers": config.all_headers,
        "timeout": config.timeout,
        "limits": config.limits,
        "transport": transport,
    }


@contextmanager
def environment_errors() -> Iterator[None]:
    """While an httpx client is made, which reads proxies and certificates from the environment."""
    try:
        yield
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        raise InvalidArgument(
            f"The environment's proxies or certificates cannot be used: {_reason(error)}.",
            fix="See ALL_PROXY, HTTP_PROXY, HTTPS_PROXY, SSL_CERT_FILE and SSL_CERT_DIR; "
            "NO_PROXY leaves hosts out, and SOCKS proxies need: pip install 'httpx[socks]'.",
        ) from error


@contextmanager
def transport_errors(
    config: ClientConfig, client: httpx.Client | httpx.AsyncClient
) -> Iterator[None]:
    """While `client` sends, and while it reads an answer whole."""
    try:
        yield
    except httpx.ConnectTimeout as error:
        message = (
            f"{config.shown_url} did not accept the connection in {config.connect_timeout:g} s."
        )
        raise Timeout(message) from error
    except httpx.PoolTimeout as error:
        message = "No connection of the client's own became free in time; nothing was sent."
        raise Timeout(message, fix="Raise the limits of its transport.") from error
    except httpx.TimeoutException as error:
        raise Timeout(f"{config.shown_url} was silent for {config.read_timeout:g} s.") from error
    except httpx.ConnectError as error:
        raise _not_connected(config, error) from error
    except UnicodeError as error:
        # Of a proxy whose name cannot be looked up; else of a callback of the caller's.
        if getattr(error, "encoding", "idna") != "idna":
            raise
        raise _not_connected(config, error) from error
    except httpx.RequestError as error:
        message = f"The exchange with {config.shown_url} failed: {_reason(error)}."
        raise TransportError(message) from error
    except RuntimeError as error:
        if not client.is_closed:
            raise
        raise TransportError("The client is closed.", fix="Make another one.") from error


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


def _not_connected(config: ClientConfig, error: Exception) -> TransportError:
    return TransportError(
        f"Cannot connect to {config.shown_url}: {_reason(error)}.",
        fix="Is the server running? Start it with 'dynamic-lora serve', or give another URL.",
    )


def _reason(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__


def _is_this_machine(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        address = ip_address(host)
        return address.is_loopback or address.is_unspecified  # 0.0.0.0, as servers print it
    except ValueError:  # a name: these two are this machine everywhere (RFC 6761, 6.3)
        return host == "localhost" or host.endswith(".localhost")
