"""The FastAPI application: routes, error answers, and the runtime's life."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from dynamic_lora_server.config import ServerConfig
from dynamic_lora_server.http import problems
from dynamic_lora_server.http.access import Guard, Keys, describe_keys
from dynamic_lora_server.http.access_log import REQUEST_ID, AccessLog
from dynamic_lora_server.http.body_limit import BodyLimit
from dynamic_lora_server.http.head import HeadAsGet
from dynamic_lora_server.metrics import RequestCounter
from dynamic_lora_server.routes import (
    adapters,
    chat,
    completions,
    compositions,
    generate,
    lora_adapters,
    models,
    responses,
    service,
    tokenize,
)
from dynamic_lora_server.schemas.generate import StreamEvent
from dynamic_lora_server.schemas.openai_answers import ChatChunk
from dynamic_lora_server.schemas.problem import Problem
from dynamic_lora_server.schemas.responses_events import ResponseEvent
from dynamic_lora_server.state import Load, ServerState
from dynamic_lora_server.version import own_version

if TYPE_CHECKING:
    from dynamic_lora_server.runtime import Runtime

_log = logging.getLogger(__name__)

_DESCRIPTION = """\
One base model, many LoRA adapters, mixed in one batch.

Errors are problem documents (RFC 9457); below `/v1`, OpenAI's error objects.
Until the model is loaded everything but `/health` and `/metrics` answers 503.
"""


_RESOURCES = (
    generate,
    adapters,
    compositions,
    completions,
    chat,
    responses,
    models,
    lora_adapters,
    tokenize,
    service,
)
_ROUTES = tuple(route for resource in _RESOURCES for route in resource.router.routes)
_REQUEST_ID_HEADER = {
    "description": "The request's id: its own header of this name, if that has up to 128 visible "
    "ASCII characters, or else a new one.",
    "schema": {"type": "string"},
}


class _Application(FastAPI):
    """The framework's, with what is to see every answer around the framework's own middleware too.

    That answers unforeseen errors, outside of all that `add_middleware` adds.
    """

    def build_middleware_stack(self) -> ASGIApp:
        """All layers, from the outermost."""
        server: ServerState = self.state.server
        stack = super().build_middleware_stack()
        if server.config.allowed_origins:
            stack = CORSMiddleware(
                stack,
                allow_origins=server.config.allowed_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["*"],
            )
        return AccessLog(RequestCounter(HeadAsGet(stack), server.metrics, _ROUTES))


def create_app(
    config: ServerConfig,
    *,
    load: Load | None = None,
    on_ready: "Callable[[Runtime], object] | None" = None,
    on_failure: Callable[[Exception], object] | None = None,
) -> FastAPI:
    """The application of one server. It serves at once and loads the model meanwhile.

    `load` makes the runtime (default: `Runtime.load` of `config`) on a thread of
    its own. `on_ready` or `on_failure` is called on the event loop with the outcome, and
    `on_failure` also when the engine breaks later on; without it the log says so.
    """
    state = ServerState(config)
    bring_up = partial(_bring_up, state, load or partial(_load, config), on_ready, on_failure)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(bring_up())
        try:
            yield
        finally:  # a second interrupt cancels what is here
            loading.cancel()
            with suppress(asyncio.CancelledError):
                await loading
            await state.go_down()

    app = _Application(
        title="Dynamic LoRA",
        version=own_version(),
        description=_DESCRIPTION,
        lifespan=lifespan,
    )
    app.state.server = state
    for resource in _RESOURCES:
        app.include_router(resource.router)
    keys = Keys.of(config.api_keys, config.admin_keys)
    # The last that is added is the first to see a request.
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    app.add_middleware(Guard, keys=keys, origins=config.allowed_origins)
    problems.install(app)
    app.openapi = partial(_openapi, app, app.openapi, keys)  # type: ignore[method-assign]
    return app


def _load(config: ServerConfig) -> "Runtime":
    # Imports torch and transformers: on the loading thread, so that /health need not wait.
    from dynamic_lora_server.runtime import Runtime

    return Runtime.load(config)


async def _bring_up(
    state: ServerState,
    load: Load,
    on_ready: "Callable[[Runtime], object] | None",
    on_failure: Callable[[Exception], object] | None,
) -> None:
    try:
        await state.come_up(load)
    except Exception as error:
        _log.debug("the model could not be loaded", exc_info=error)
        if on_failure is None:
            _log.error("the model could not be loaded: %s", error)
        else:
            on_failure(error)
        return
    if on_ready is not None:
        on_ready(state.runtime)
    broken = await state.runtime.service.until_broken()
    if on_failure is not None:
        on_failure(broken)


def _openapi(app: FastAPI, build: Callable[[], dict[str, Any]], keys: Keys) -> dict[str, Any]:
    """FastAPI's document, with the models that only other media types refer to, and the keys."""
    if app.openapi_schema is None:
        schema = build()
        schemas = schema["components"]["schemas"]
        for model in (Problem, StreamEvent, ChatChunk, ResponseEvent):
            own = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(own.pop("$defs", {}))
            schemas[model.__name__] = own
        _drop_default_errors(schema)
        describe_keys(schema, keys)
        _add_request_ids(schema)
        app.openapi_schema = schema
    return app.openapi_schema


def _add_request_ids(schema: dict[str, Any]) -> None:
    """Every answer carries the header."""
    schema["components"]["headers"] = {REQUEST_ID: _REQUEST_ID_HEADER}
    for operation in (op for path in schema["paths"].values() for op in path.values()):
        for response in operation["responses"].values():
            headers = response.setdefault("headers", {})
            headers[REQUEST_ID] = {"$ref": f"#/components/headers/{REQUEST_ID}"}


def _drop_default_errors(schema: dict[str, Any]) -> None:
    """Take out the 422 that FastAPI adds by itself: this server answers with other documents."""
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    for operation in (op for path in schema["paths"].values() for op in path.values()):
        if "HTTPValidationError" in str(operation["responses"].get("422")):
            del operation["responses"]["422"]
