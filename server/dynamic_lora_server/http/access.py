"""Who may do what: keys for all routes, and keys for those that change adapters.

Clients send a key as OAuth's bearer tokens go (RFC 6750): `Authorization: Bearer KEY`.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dynamic_lora_server.errors import CrossOrigin, Forbidden, Unauthorized
from dynamic_lora_server.http.problems import PROBLEM_MEDIA_TYPE, answer, fault_of

# What probes ask, and what a browser shows before anybody has given it a key.
_OPEN = frozenset(
    {"/health", "/ready", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}
)
_ADMINISTERED = (
    *("/adapters", "/compositions"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
)
_READS = frozenset({"GET", "HEAD"})
_OWN_SITE = ("same-origin", "none")  # none: whoever uses the browser
_SCHEME = "key"  # its name in the OpenAPI document
_METHODS = frozenset({"get", "put", "post", "delete", "patch"})  # as OpenAPI has them


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that a server takes, as SHA-256 digests.

    With `clients` every route wants a key but those that are open to all. With `admins` what
    changes adapters and compositions wants one of these; they are good for all else too.
    """

    clients: frozenset[bytes]
    admins: frozenset[bytes]

    @classmethod
    def of(cls, clients: Iterable[str], admins: Iterable[str]) -> "Keys":
        """From the keys themselves."""
        return cls(frozenset(map(_digest, clients)), frozenset(map(_digest, admins)))

    def wanted(self, method: str, path: str) -> frozenset[bytes]:
        """The keys of which one is needed, none if the route is open."""
        if path in _OPEN:
            return frozenset()
        if self.admins and method not in _READS and _is_administered(path):
            return self.admins
        return self.clients | self.admins if self.clients else frozenset()

    def check(self, method: str, path: str, authorization: str | None) -> None:
        """Let a request pass. Raises Unauthorized or Forbidden."""
        wanted = self.wanted(method, path)
        if not wanted:
            return
        # Of digests, the time that a comparison takes tells nothing about the keys.
        digest = _digest(_bearer(authorization))
        if digest in wanted:
            return
        if digest in self.clients:
            raise Forbidden(
                "This key may not change adapters or compositions.",
                fix="Send one of the server's admin keys.",
            )
        raise Unauthorized("The server does not know this key.", given=True)


class Guard:
    """ASGI middleware: 401 and 403 for requests without the key that their route wants.

    And 403 for what a browser sends without a key for a page of another origin than `origins`: that
    could not read the answer, but a form may change adapters.
    """

    def __init__(self, app: ASGIApp, keys: Keys, origins: Collection[str] = ()) -> None:
        self._app = app
        self._keys = keys
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run as an ASGI application."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                self._keys.check(scope["method"], scope["path"], headers.get("authorization"))
                self._check_origin(scope["method"], headers)
            except (Unauthorized, Forbidden) as error:
                refusal = answer(fault_of(error), path=scope["path"])
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check_origin(self, method: str, headers: Headers) -> None:
        origin = headers.get("origin")
        # A page that sends a key has asked first; other credentials browsers add by themselves.
        if method in _READS or origin is None or _bears(headers.get("authorization")):
            return
        if "*" in self._origins or origin in self._origins:
            return
        # Browsers that tell it know better: a proxy may have changed the host.
        site = headers.get("sec-fetch-site")
        own = (
            origin.partition("://")[2] == headers.get("host") if site is None else site in _OWN_SITE
        )
        if not own:
            raise CrossOrigin(
                f"A page of the origin {origin} may not send this.",
                fix=f"Start the server with --allowed-origin {origin} to let it, or send a key.",
            )


def describe_keys(schema: dict[str, Any], keys: Keys) -> None:
    """Write into an OpenAPI document which operations want a key, and what they answer without."""
    for path, operations in schema["paths"].items():
        for method in _METHODS & operations.keys():
            if keys.wanted(method.upper(), path):
                operations[method]["security"] = [{_SCHEME: []}]
                operations[method]["responses"] |= _refusals(path)
                scheme = {"type": "http", "scheme": "bearer"}
                schema["components"]["securitySchemes"] = {_SCHEME: scheme}


def _refusals(path: str) -> dict[str, Any]:
    model, media = ("ErrorAnswer", "application/json")
    if not path.startswith("/v1/"):
        model, media = ("Problem", PROBLEM_MEDIA_TYPE)
    content = {media: {"schema": {"$ref": f"#/components/schemas/{model}"}}}
    return {
        "401": {"description": "No key, or none that the server knows", "content": content},
        "403": {"description": "The key is not for this", "content": content},
    }


def _bears(authorization: str | None) -> bool:
    """Whether a key was sent, be it right or not."""
    return (authorization or "").strip().lower().startswith("bearer ")


def _bearer(authorization: str | None) -> str:
    """The key in the header's value. Raises Unauthorized if there is none."""
    scheme, _, key = (authorization or "").strip().partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthorized("This server wants a key.", given=False)
    return key.strip()


def _is_administered(path: str) -> bool:
    return any(path == root or path.startswith(f"{root}/") for root in _ADMINISTERED)


def _digest(key: str) -> bytes:
    return sha256(key.encode()).digest()
