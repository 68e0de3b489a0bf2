"""What routes ask for: the application's state, strict JSON, and errors as OpenAPI sees them."""

import json
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException

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
    path = request.url.path
    for name in request.query_params:
        if request.method in ("GET", "DELETE"):
            fix = "Leave it out."
        elif name == "adapter" and not path.startswith(("/adapters", "/compositions/")):
            fix = "Below /v1, the field model of the body names the adapter."
        else:
            fix = "Send it in the body, if it is a field of that."
        message = f"{path} takes no {name} in its address."
        raise InvalidParameter(message, field=name, fix=fix)


NoQuery = Depends(no_query)


class _StrictRequest(Request):
    """A request whose JSON body is parsed strictly, and checked by a route's `field`."""

    def __init__(self, request: Request, field: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._field = field

    async def json(self) -> Any:
        """Parse the body, once. A large one is also validated on a thread; FastAPI leaves the
        validated model as it is. Raises DuplicateKey and RequestValidationError."""
        if not hasattr(self, "_json"):
            body = await self.body()
            state = _state(self)
            if state.is_large(body):
                self._json = await state.parse(partial(_checked, body, self._field))
            else:
                self._json = _parsed(body)
        return self._json


def _parsed(body: bytes) -> Any:
    return json.loads(body, object_pairs_hook=unique_keys)


def _checked(body: bytes, field: Any) -> Any:
    value, errors = field.validate(_parsed(body), {}, loc=("body",))
    if errors:
        raise RequestValidationError(errors)
    return value


class StrictRoute(APIRoute):
    """A route whose JSON body has each key once; the framework's would take the last in silence.

    Large bodies are parsed and checked on threads: those of hundreds of thousands of parts would
    hold up everybody's streams for seconds.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The framework's handler, on a request that reads JSON strictly."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            try:
                return await handle(_StrictRequest(request, self.body_field))
            except HTTPException as error:
                # The framework's 400 for whatever happens while a body is read.
                if isinstance(error.__cause__, RequestValidationError):
                    raise error.__cause__ from None
                raise

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
