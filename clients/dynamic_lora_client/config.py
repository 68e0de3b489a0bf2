"""Settings that both clients share."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx

from dynamic_lora_client._version import __version__
from dynamic_lora_client.errors import InvalidArgument
from dynamic_lora_client.retry import RetryPolicy

DEFAULT_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Where the server is and how long to wait for it.

    `connect_timeout` and `read_timeout` are in seconds; the second bounds the
    silence between two packets, so a stream may last longer. `headers` go with
    every request (an `Authorization` for a proxy, say).

    Raises InvalidArgument.
    """

    url: str = DEFAULT_URL
    connect_timeout: float = 5.0
    read_timeout: float = 300.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise InvalidArgument(f"The server's URL {self.url!r} is not valid: {error}.") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise InvalidArgument(
                f"The server's URL {self.url!r} is not an http or https address.",
                fix=f"Give one like {DEFAULT_URL}.",
            )
        for name in ("connect_timeout", "read_timeout"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"{name} must be above 0 seconds.")

    @property
    def timeout(self) -> httpx.Timeout:
        """The timeouts in httpx's form; writing is bounded like reading."""
        return httpx.Timeout(self.read_timeout, connect=self.connect_timeout)

    @property
    def all_headers(self) -> dict[str, str]:
        """The headers of every request, with the client's own name."""
        return {"user-agent": f"dynamic-lora-client/{__version__}", **self.headers}
