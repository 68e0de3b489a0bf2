"""Keys of clients and of administrators, on every route; pages of other origins."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from starlette.testclient import TestClient

from dynamic_lora_server.app import create_app
from dynamic_lora_server.config import ServerConfig

CLIENT, ADMIN = "client-key", "admin-key"
OPEN = {"/health", "/ready", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}


def _never() -> NoReturn:
    raise RuntimeError("no model in this test")


def _operations() -> Iterator[tuple[str, str]]:
    """Method and path of every route, those of the framework's own pages too."""
    for path, operations in create_app(ServerConfig()).openapi()["paths"].items():
        for method in operations:
            yield method.upper(), re.sub(r"\{.*?\}", "x", path)
    for path in ("/docs", "/redoc", "/openapi.json", "/no-such-route"):
        yield "GET", path


OPERATIONS = list(_operations())


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def _changes_adapters(method: str, path: str) -> bool:
    changed = ("/adapters", "/compositions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
    return method != "GET" and path.startswith(changed)


class Server:
    """Asks an application without a model for the status of a request."""

    def __init__(self, home: Path, **options: tuple[str, ...]) -> None:
        config = ServerConfig(home=home, **options)  # type: ignore[arg-type]
        self.client = TestClient(create_app(config, load=_never))

    def status(self, operation: tuple[str, str], headers: dict[str, str]) -> int:
        return self.client.request(*operation, headers=headers).status_code


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("access")


@pytest.fixture(scope="module")
def both(home: Path) -> Server:
    return Server(home, api_keys=(CLIENT, "another"), admin_keys=(ADMIN,))


@pytest.mark.parametrize("operation", OPERATIONS, ids=" ".join)
def test_each_route_takes_the_keys_that_are_meant_for_it(
    both: Server, operation: tuple[str, str]
) -> None:
    without_keys = both.status(operation, _bearer(ADMIN))
    assert without_keys not in (401, 403)
    is_open = operation[1] in OPEN
    for headers in ({}, _bearer("guessed"), {"authorization": f"Basic {CLIENT}"}):
        assert both.status(operation, headers) == (without_keys if is_open else 401)
    for key in (CLIENT, "another"):
        expected = 403 if _changes_adapters(*operation) else without_keys
        assert both.status(operation, _bearer(key)) == expected


@pytest.mark.parametrize("operation", OPERATIONS, ids=" ".join)
def test_with_admin_keys_alone_all_but_changes_is_open(
    home: Path, operation: tuple[str, str]
) -> None:
    server = Server(home, admin_keys=(ADMIN,))
    refused = server.status(operation, {}) == 401
    assert refused == _changes_adapters(*operation)
    assert server.status(operation, _bearer(ADMIN)) not in (401, 403)


def test_with_client_keys_alone_they_are_good_for_all(home: Path) -> None:
    server = Server(home, api_keys=(CLIENT,))
    for operation in OPERATIONS:
        assert server.status(operation, _bearer(CLIENT)) not in (401, 403)


def test_without_keys_a_stray_one_harms_nobody(home: Path) -> None:
    server = Server(home)
    for operation in OPERATIONS:
        assert server.status(operation, _bearer("stray")) == server.status(operation, {})


def test_refusals_say_what_to_send(both: Server) -> None:
    missing = both.client.get("/adapters")
    assert missing.json()["type"] == "/problems/unauthorized"
    assert missing.json()["fix"] == "Send one in the header Authorization: Bearer KEY."
    assert missing.headers["www-authenticate"] == "Bearer"
    unknown = both.client.get("/v1/models", headers=_bearer("guessed"))
    assert unknown.json()["error"]["code"] == "invalid_api_key"
    assert unknown.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    short = both.client.delete("/adapters/ner", headers=_bearer(CLIENT))
    assert short.json()["type"] == "/problems/forbidden"
    assert short.headers["www-authenticate"] == 'Bearer error="insufficient_scope"'


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer  ", "bearer\tclient-key", "Bearer é"])
def test_headers_that_hold_no_key(both: Server, value: str) -> None:
    headers = {b"authorization": value.encode("latin-1")}
    assert both.client.get("/info", headers=headers).status_code == 401


def test_the_openapi_document_tells_where_a_key_is_wanted(both: Server) -> None:
    document = both.client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"] == {
        "key": {"type": "http", "scheme": "bearer"}
    }
    assert document["paths"]["/generate"]["post"]["security"] == [{"key": []}]
    assert {"401", "403"} <= document["paths"]["/v1/models"]["get"]["responses"].keys()
    assert "security" not in document["paths"]["/health"]["get"]
    assert "security" not in str(create_app(ServerConfig()).openapi())


def test_keys_are_not_shown_with_the_configuration() -> None:
    assert CLIENT not in repr(ServerConfig(api_keys=(CLIENT,), admin_keys=(CLIENT,)))


PAGE = "https://example.org"


def test_a_page_of_an_allowed_origin_may_ask(home: Path) -> None:
    server = Server(home, api_keys=(CLIENT,), allowed_origins=(PAGE,))
    asks = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    # A browser sends no key when it asks whether it may.
    preflight = server.client.options("/generate", headers=asks)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    # Without the header on a refusal, a page could not read why.
    refused = server.client.get("/info", headers={"origin": PAGE})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == PAGE


def test_a_page_may_read_an_error_that_nobody_foresaw(home: Path) -> None:
    app = create_app(ServerConfig(home=home, allowed_origins=(PAGE,)), load=_never)

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("nobody foresaw this")

    client = TestClient(app, raise_server_exceptions=False)
    answer = client.get("/broken", headers={"origin": PAGE})
    assert (answer.status_code, answer.json()["type"]) == (500, "/problems/internal-error")
    assert answer.headers["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize("origins", [(), (PAGE,)])
def test_a_page_of_another_origin_may_not(home: Path, origins: tuple[str, ...]) -> None:
    server = Server(home, allowed_origins=origins)
    answer = server.client.get("/health", headers={"origin": "https://elsewhere.org"})
    assert "access-control-allow-origin" not in answer.headers


def _upload(server: Server, **headers: str) -> int:
    """As a form of a page does it: no browser asks first whether it may."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    files = {"files": ("adapter_config.json", b"{}")}
    answer = server.client.post("/adapters", headers=named, data={"name": "x"}, files=files)
    return answer.status_code


def test_a_page_of_another_origin_changes_nothing(home: Path) -> None:
    server = Server(home, allowed_origins=(PAGE,))
    passes = _upload(server)
    assert passes not in (401, 403)
    for origin in ("https://elsewhere.org", "null", "http://testserver.elsewhere.org", "http://["):
        assert _upload(server, origin=origin) == 403
    assert _upload(server, origin="null", authorization="Basic eDp5") == 403
    assert _upload(server, origin=PAGE) == passes
    assert _upload(server, origin="http://testserver") == passes
    assert _upload(server, origin="https://proxy", sec_fetch_site="same-origin") == passes
    assert _upload(server, origin="http://testserver", sec_fetch_site="cross-site") == 403
    refused = server.client.post("/generate", json={}, headers={"origin": "null"})
    assert refused.json()["type"] == "/problems/cross-origin"
    assert "www-authenticate" not in refused.headers
    assert server.client.get("/health", headers={"origin": "null"}).status_code == 200


def test_a_page_with_a_key_needs_no_other_leave(home: Path) -> None:
    """Somebody gave it the key, and it had to ask first whether it may send one."""
    server = Server(home, api_keys=(CLIENT,))
    assert _upload(server, origin=PAGE, **_bearer(CLIENT)) not in (401, 403)


def test_with_all_origins_allowed_all_pages_may(home: Path) -> None:
    server = Server(home, allowed_origins=("*",))
    assert _upload(server, origin=PAGE) == _upload(server)
