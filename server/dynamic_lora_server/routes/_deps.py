"""What routes ask for: the application's state, strict JSON, and errors as OpenAPI sees them."""

import json
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from starlette.convertors import Convertor, register_url_convertor

from dynamic_lora_adapters.files.json_file import unique_keys
from dynamic_lora_server.errors import InvalidParameter
from dynamic_lora_server.http.problems import PROBLEM_MEDIA_TYPE
from dynamic_lora_server.http.sse import EVENT_STREAM
from dynamic_lora_server.schemas.openai_answers import ErrorAnswer
from dynamic_lora_server.state import ServerState

if TYPE_CHECKING:
    from dynamic_lora_server.runtime import Runtime

_DESCRIPTIONS = {
    400: "Malformed body",
    404: "No such adapter",
    409: "An adapter or a composition has the name",
    413: "Larger than the server accepts",
    415: "Wrong Content-Type",
    422: "Refused: a field is wrong, unknown or not served",
    429: "Too many requests wait; see Retry-After",
    500: "The engine failed",
    502: "The adapter's source cannot be reached",
    503: "Not ready; see Retry-After",
}


def _state(request: Request) -> ServerState:
    return cast(ServerState, request.app.state.server)


State = Annotated[ServerState, Depends(_state)]


def _runtime(state: State) -> Any:
    return state.runtime


# Loading the runtime's module imports torch; its name is enough here.
Ready = Annotated["Runtime", Depends(_runtime)]


class _NameConvertor(Convertor[str]):
    """`{name:name}` in a path: an adapter's or a composition's, which may hold a slash.

    A server hears `%2F` as a slash, so both spellings are one.
    """

    regex = "[^/]+(?:/[^/]+)?"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("name", _NameConvertor())


def no_query(request: Request) -> None:
    """For routes without query parameters. Raises InvalidParameter: a wish would be ignored."""
    for name in request.query_params:
        if request.method == "GET":
            fix = "Leave it out."
        elif name == "adapter":
            fix = "Below /v1, the field model of the body names the adapter."
        else:
            fix = "Send it in the body, if it is a field of that."
        message = f"{request.url.path} takes no {name} in its address."
        raise InvalidParameter(message, field=name, fix=fix)


NoQuery = Depends(no_query)


class _StrictRequest(Request):
    async def json(self) -> Any:
        """The body as JSON, read once. Raises DuplicateKey."""
        if not hasattr(self, "_json"):
            self._json = json.loads(await self.body(), object_pairs_hook=unique_keys)
        return self._json


class StrictRoute(APIRoute):
    """A route whose JSON body has each key once; the framework's would take the last in silence."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The framework's handler, on a request that reads JSON strictly."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers these statuses with problem documents."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {
            "description": _DESCRIPTIONS[status],
            "content": {PROBLEM_MEDIA_TYPE: {"schema": schema}},
        }
        for status in statuses
    }


def event_stream(model: str) -> dict[str, Any]:
    """The `content` of a route that can answer with server-sent events of a model."""
    data = {"type": "string", "description": f"A {model} as JSON, or an error."}
    return _event_stream(data=data)


def typed_event_stream(model: str) -> dict[str, Any]:
    """As `event_stream`, where each event is named by the `type` of its model."""
    name = {"type": "string", "description": "The event's `type`."}
    return _event_stream(event=name, data={"type": "string", "description": f"A {model} as JSON."})


def _event_stream(**fields: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "required": list(fields), "properties": fields}
    return {EVENT_STREAM: {"schema": schema}}


def openai_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route below /v1 that answers these statuses with errors."""
    return {
        status: {"description": _DESCRIPTIONS[status], "model": ErrorAnswer} for status in statuses
    }
