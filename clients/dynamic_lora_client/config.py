"""Settings that both clients share."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx

from dynamic_lora_client._version import __version__
from dynamic_lora_client.errors import InvalidArgument
from dynamic_lora_client.retry import RetryPolicy

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_MAX_CONNECTIONS = 100
_KEY = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Where the server is and how long to wait for it.

    `connect_timeout` and `read_timeout` are in seconds; the second bounds the
    silence between two packets, so a stream may last longer. Of the calls made at
    once, `max_connections` go out, streams that are read included, and the others
    wait for one of these to end, for as long as that takes. `api_key` goes with every
    request as a bearer token, and so do `headers`.

    Raises InvalidArgument.
    """

    url: str = DEFAULT_URL
    connect_timeout: float = 5.0
    read_timeout: float = 300.0
    max_connections: int = DEFAULT_MAX_CONNECTIONS
    api_key: str | None = field(default=None, repr=False)
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
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            raise InvalidArgument("api_key must be of visible ASCII characters, without spaces.")
        if self.api_key is not None and "authorization" in map(str.lower, self.headers):
            raise InvalidArgument("api_key and the header Authorization would be sent as one.")
        try:
            httpx.Headers(dict(self.headers))
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"headers must be ASCII: {error.object!r} is not.") from None
        for name in ("connect_timeout", "read_timeout"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"{name} must be above 0 seconds.")
        if self.max_connections < 1:
            raise InvalidArgument("max_connections must be at least 1.")

    @property
    def timeout(self) -> httpx.Timeout:
        """The timeouts in httpx's form; writing is bounded like reading, waiting here is not."""
        return httpx.Timeout(self.read_timeout, connect=self.connect_timeout, pool=None)

    @property
    def limits(self) -> httpx.Limits:
        """How many connections there may be; each is kept for the calls that wait."""
        return httpx.Limits(
            max_connections=self.max_connections, max_keepalive_connections=self.max_connections
        )

    @property
    def all_headers(self) -> dict[str, str]:
        """The headers of every request, with the client's own name."""
        key = {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}
        return {"user-agent": f"dynamic-lora-client/{__version__}", **key, **self.headers}
