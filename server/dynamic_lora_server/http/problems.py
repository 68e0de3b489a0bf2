"""Errors as HTTP answers: one handler, two forms.

Outside `/v1` an error is an RFC 9457 problem document whose `type` is a stable
path, `/problems/<slug>`; docs/api.md lists them. Below `/v1` it is OpenAI's
error object, with 400 where the problem document has 422, as OpenAI's clients
expect.
"""

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from itertools import takewhile
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match

from dynamic_lora_adapters import errors as adapter_errors
from dynamic_lora_adapters.files.json_file import DuplicateKey, unique_keys
from dynamic_lora_server import errors
from dynamic_lora_server.http.access_log import request_id
from dynamic_lora_server.http.fault_kinds import (
    BY_STATUS,
    INVALID_REQUEST,
    MALFORMED_JSON,
    METHOD_NOT_ALLOWED,
    TABLE,
    UNSUPPORTED_MEDIA_TYPE,
    Kind,
)
from dynamic_lora_server.http.field_names import field_of
from dynamic_lora_server.intake.sources import SourceUnavailable
from dynamic_lora_server.intake.uploads import JSON, media_type
from dynamic_lora_server.schemas.openai_answers import ErrorAnswer, ErrorBody
from dynamic_lora_server.schemas.problem import Problem
from dynamic_lora_server.schemas.responses import INPUT_FORMS
from dynamic_lora_server.schemas.tokenize import FORMS
from dynamic_lora_server.schemas.tools import CHOICES

PROBLEM_MEDIA_TYPE = "application/problem+json"
NOT_READY_RETRY_SECONDS = 5
_LOGGED = (500, 502, 507)  # a server that loads or shuts down, 503, says so itself
# Errors quote names out of uploads, which may be as long as the files.
_MAX_SENTENCE = 2000
# Of a body with many faults so many are told; the others are counted.
_MAX_TOLD = 20

W = TypeVar("W", bound=BaseModel)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An error ready to be written on either wire."""

    kind: Kind
    detail: str
    field: str | None = None
    fix: str | None = None
    near: Sequence[str] = ()
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


# Where the framework says no more than the status' name.
_DETAILS: Mapping[int, str] = {
    404: "No route has this path; GET /openapi.json lists them.",
    405: "This path does not take this method; the Allow header names those that it takes.",
}
_TEXTS = ("str", "constrained-str")  # what pydantic calls the texts of a union
_FORMS = FORMS | CHOICES | INPUT_FORMS  # and what the models call the members of theirs


def install(app: FastAPI) -> None:
    """Make every error of `app` an answer of this table."""
    for error in (*TABLE, RequestValidationError, HTTPException):
        app.add_exception_handler(error, _handle)


def stream_fault(error: Exception) -> Fault:
    """What is wrong, for an answer that has begun; logged, as no handler will see it."""
    fault = fault_of(error)
    if fault.kind.status in _LOGGED:
        _log.error("a stream broke off: %s (request %s)", error, request_id(), exc_info=error)
    return fault


def parse_body(model: type[W], body: bytes) -> W:
    """A JSON body that FastAPI does not parse, with the errors of one that it does."""
    _refuse_duplicates(body)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]
        raise RequestValidationError(faults) from error


def _refuse_duplicates(body: bytes) -> None:
    try:
        json.loads(body, object_pairs_hook=unique_keys)
    except DuplicateKey as error:
        raise HTTPException(400) from error
    except (ValueError, RecursionError):
        return  # pydantic says what is wrong


async def _handle(request: Request, error: Exception) -> Response:
    fault = fault_of(error, content_type=request.headers.get("content-type", ""))
    if fault.kind is METHOD_NOT_ALLOWED:
        fault = dataclasses.replace(fault, headers={"Allow": _allowed(request)})
    if fault.kind.status in _LOGGED:
        what = (request.method, request.url.path, error, request_id())
        _log.error("%s %s: %s (request %s)", *what)
    return answer(fault, path=request.url.path)


def _allowed(request: Request) -> str:
    """The methods of all routes that have the path; the framework names those of the first."""
    methods: set[str] = set()
    for route in _routes(request.app.routes):
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= set(getattr(route, "methods", None) or ())
    if "GET" in methods:
        methods.add("HEAD")
    return ", ".join(sorted(methods))


def _routes(routes: Iterable[BaseRoute]) -> Iterator[BaseRoute]:
    """Those of included routers, too, which FastAPI keeps as a route each."""
    for route in routes:
        inner = getattr(route, "original_router", None)
        yield from [route] if inner is None else _routes(inner.routes)


def fault_of(error: Exception, *, content_type: str = "application/json") -> Fault:
    """What is wrong, from the error; an unforeseen error tells the client nothing of itself."""
    fault = _fault_of(error, content_type)
    return dataclasses.replace(
        fault,
        detail=_capped(fault.detail) or "",
        field=_capped(fault.field),
        fix=_capped(fault.fix),
    )


def _fault_of(error: Exception, content_type: str) -> Fault:
    if isinstance(error, RequestValidationError):
        return _validation_fault(error.errors(), content_type)
    if isinstance(error, HTTPException):
        return _http_fault(error)
    kind = next(TABLE[cls] for cls in type(error).__mro__ if cls in TABLE)
    if isinstance(error, errors.ServerError | adapter_errors.AdapterError):
        return Fault(
            kind=kind,
            detail=error.message,
            field=error.field,
            fix=error.fix,
            near=getattr(error, "near", ()),
            headers=_headers(error),
        )
    return Fault(kind=kind, detail="The server met an error of its own; its log has the details.")


def answer(fault: Fault, *, path: str) -> Response:
    """The HTTP answer of a fault, in the form of the API that `path` belongs to."""
    if fault.field is not None and fault.kind is not INVALID_REQUEST:  # that has the body's own
        fault = dataclasses.replace(fault, field=field_of(path, fault.field))
    if path.startswith("/v1/"):
        return Response(
            _dump(openai_error(fault)),
            status_code=_openai_status(fault.kind.status),
            media_type="application/json",
            headers=fault.headers,
        )
    return Response(
        _dump(problem(fault)),
        status_code=fault.kind.status,
        media_type=PROBLEM_MEDIA_TYPE,
        headers=fault.headers,
    )


def problem(fault: Fault) -> dict[str, Any]:
    """The RFC 9457 document of a fault."""
    return Problem(
        type=f"/problems/{fault.kind.slug}",
        title=fault.kind.title,
        status=fault.kind.status,
        detail=fault.detail,
        field=fault.field,
        fix=fault.fix,
        error=_sentence(fault),
        error_type=fault.kind.error_type,
        near=list(fault.near) or None,
    ).model_dump(exclude_none=True)


def openai_error(fault: Fault) -> dict[str, Any]:
    """OpenAI's error object of a fault."""
    server_side = fault.kind.status >= HTTPStatus.INTERNAL_SERVER_ERROR
    return ErrorAnswer(
        error=ErrorBody(
            message=_sentence(fault),
            type="server_error" if server_side else "invalid_request_error",
            param=fault.field,
            code=fault.kind.code or fault.kind.slug.replace("-", "_"),
        )
    ).model_dump()


def _capped(text: str | None) -> str | None:
    if text is None or len(text) <= _MAX_SENTENCE:
        return text
    return f"{text[: _MAX_SENTENCE - 3]}..."


def _sentence(fault: Fault) -> str:
    return " ".join(filter(None, (fault.detail, fault.fix)))


def _openai_status(status: int) -> int:
    return 400 if status == HTTPStatus.UNPROCESSABLE_ENTITY else status


def _dump(document: Mapping[str, Any]) -> bytes:
    # ASCII, because a refused text may hold a lone surrogate, which UTF-8 cannot carry.
    return json.dumps(document).encode("ascii")


def _headers(error: Exception) -> dict[str, str]:
    match error:
        case errors.QueueFull():
            return {"Retry-After": str(error.retry_after)}
        case errors.NotReady():
            return {"Retry-After": str(NOT_READY_RETRY_SECONDS)}
        case SourceUnavailable(retry_after=int(seconds)):
            return {"Retry-After": str(seconds)}
        case errors.Unauthorized():
            return {"WWW-Authenticate": 'Bearer error="invalid_token"' if error.given else "Bearer"}
        case errors.CrossOrigin():
            return {}
        case errors.Forbidden():
            return {"WWW-Authenticate": 'Bearer error="insufficient_scope"'}
    return {}


def _http_fault(error: HTTPException) -> Fault:
    if isinstance(error.__cause__, ClientDisconnect):  # the framework's 400, while it read a body
        return Fault(kind=TABLE[ClientDisconnect], detail="The client went away.")
    if isinstance(error.__cause__, errors.QueueFull):  # the same
        return _fault_of(error.__cause__, "")
    status = error.status_code
    unlisted = Kind(f"http-{status}", HTTPStatus(status).phrase, status)
    detail = _DETAILS.get(status) if error.detail == HTTPStatus(status).phrase else None
    detail = _unreadable(error.__cause__) or detail
    return Fault(
        kind=BY_STATUS.get(status, unlisted),
        detail=detail or str(error.detail),
        headers=error.headers or {},
    )


def _unreadable(cause: BaseException | None) -> str | None:
    """Why a body could not be read as JSON, where the framework does not say."""
    match cause:
        case UnicodeDecodeError():
            return "The body is not UTF-8."
        case DuplicateKey():
            return f"The body can be read in two ways: {cause}."
        case ValueError() if "digits" in str(cause):
            return "The body holds an integer with too many digits."
        case RecursionError():
            return "The body is nested too deeply."
    return None


def _validation_fault(faults: Sequence[Mapping[str, Any]], content_type: str) -> Fault:
    first = faults[0]
    if first["type"] == "json_invalid":
        reason = f"The body is not JSON: {first['ctx']['error']}"
        place = f" at character {first['loc'][1]}" if len(first["loc"]) > 1 else ""
        return Fault(kind=MALFORMED_JSON, detail=f"{reason}{place}.")
    if tuple(first["loc"]) == ("body",) and not _is_json(content_type):
        return Fault(
            kind=UNSUPPORTED_MEDIA_TYPE,
            detail=f"The body must be JSON; its Content-Type is {content_type or 'missing'!r}.",
            fix="Send the header Content-Type: application/json.",
        )
    return Fault(
        kind=INVALID_REQUEST,
        detail=_describe(faults),
        field=_place(first),
        fix="GET /openapi.json has every field with the values it takes.",
    )


def _is_json(content_type: str) -> bool:
    kind = media_type(content_type)
    return kind == JSON or kind.endswith("+json")


def _describe(faults: Sequence[Mapping[str, Any]]) -> str:
    """One clause per field; a field of several accepted forms names what each would need."""
    clauses: dict[str, list[str]] = {}
    for fault in faults[:_MAX_TOLD]:
        reasons = clauses.setdefault(_place(fault), [])
        reason = _reason(fault)
        if reason not in reasons:
            reasons.append(reason)
    told = [f"{path}: {', or '.join(reasons)}" for path, reasons in clauses.items()]
    if (num_more := len(faults) - _MAX_TOLD) > 0:
        told.append(f"and {num_more} more")
    return "; ".join(told) + "."


def _reason(fault: Mapping[str, Any]) -> str:
    if fault["type"] == "extra_forbidden":
        return "is not a field of this request"
    return str(fault["msg"]).removeprefix("Value error, ")


def _place(fault: Mapping[str, Any]) -> str:
    """The path of a field, whatever a field that is not known is called."""
    location = fault["loc"]
    if fault["type"] != "extra_forbidden":
        return _path(location)
    *path, name = location
    inside = _path(path) if len(path) > 1 else ""
    return f"{inside}.{name}" if inside and inside != path[0] else str(name)


def _path(location: Sequence[str | int]) -> str:
    """`parameters.stop.0` from pydantic's location, without its names for a union's members."""
    names = takewhile(lambda name: name not in _TEXTS and "[" not in name, map(str, location[1:]))
    return ".".join(name for name in names if name not in _FORMS) or str(location[0])
