"""Settings that both clients share."""

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx

from dynamic_lora_client._version import __version__
from dynamic_lora_client.errors import InvalidArgument
from dynamic_lora_client.retry import RetryPolicy

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_MAX_CONNECTIONS = 100
_MAX_PORT = 65535
_KEY = re.compile(r"[!-~]+")
_CREDENTIALS = re.compile(r"^(.*?//)?[^/?#]*@", re.DOTALL)
_ALL_TO_THE_LAST_AT = re.compile(r"^(.*?//)?.*@", re.DOTALL)  # of what is no URL


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Where the server is and how long to wait for it.

    `connect_timeout` and `read_timeout` are in seconds; the second bounds the
    silence between two packets, so a stream may last longer; `math.inf` sets no
    bound. Of the calls made at once, `max_connections` go out, streams that are read
    included, and the others wait for one of these to end, for as long as that takes.
    `api_key` goes with every request as a bearer token, and so do `headers`.

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
        self._check_url()
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            raise InvalidArgument("api_key must be of visible ASCII characters, without spaces.")
        self._check_credentials()
        try:
            httpx.Headers(dict(self.headers))
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"headers must be ASCII: {error.object!r} is not.") from None
        for name in ("connect_timeout", "read_timeout"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"{name} must be above 0 seconds.")
        if self.max_connections < 1:
            raise InvalidArgument("max_connections must be at least 1.")

    def _check_url(self) -> None:
        problem = f"The server's URL {self.shown_url!r} is not"
        try:
            url = httpx.URL(self.url)
            url.raw_host.decode().encode("idna")  # as who looks the name up does
        except (httpx.InvalidURL, UnicodeError) as error:
            # The parser may quote a part of a password that has a '/' in it.
            is_secret = self.shown_url != self.url
            reason = "its credentials or its host cannot be read" if is_secret else error
            raise InvalidArgument(f"{problem} valid: {reason}.") from None
        fix = f"Give one like {DEFAULT_URL}."
        if url.scheme not in ("http", "https") or not url.host:
            raise InvalidArgument(f"{problem} an http or https address.", fix=fix)
        if url.port is not None and not 0 < url.port <= _MAX_PORT:
            raise InvalidArgument(f"{problem} valid: ports are from 1 to {_MAX_PORT}.")
        if "?" in self.url or "#" in self.url:
            raise InvalidArgument(f"{problem} an address alone: it has a query or a fragment.")

    def _check_credentials(self) -> None:
        """One request has one Authorization header, and there are three ways to give it."""
        url = httpx.URL(self.url)
        given = {
            "api_key": self.api_key is not None,
            "the header Authorization": "authorization" in map(str.lower, self.headers),
            "the credentials in the URL": bool(url.username or url.password),
        }
        names = [name for name, is_given in given.items() if is_given]
        if len(names) > 1:
            raise InvalidArgument(f"{' and '.join(names)} would be sent as one.", fix="Give one.")

    @property
    def shown_url(self) -> str:
        """The URL for messages: without the credentials that may be in it."""
        try:
            httpx.URL(self.url)
        except (httpx.InvalidURL, UnicodeError):
            return _ALL_TO_THE_LAST_AT.sub(r"\1***@", self.url)
        return _CREDENTIALS.sub(r"\1***@", self.url)

    @property
    def timeout(self) -> httpx.Timeout:
        """The timeouts in httpx's form; writing is bounded like reading, waiting here is not."""
        return httpx.Timeout(
            _bound(self.read_timeout), connect=_bound(self.connect_timeout), pool=None
        )

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


def _bound(seconds: float) -> float | None:
    """None for what is longer than sockets can wait: they refuse it, infinity above all."""
    return None if seconds > threading.TIMEOUT_MAX else seconds
