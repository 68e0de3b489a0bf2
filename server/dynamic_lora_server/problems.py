"""Errors as HTTP answers: one table, one handler.

Outside `/v1` an error is an RFC 9457 problem document whose `type` is a stable
path, `/problems/<slug>`; docs/api.md lists them. Below `/v1` it is OpenAI's
error object, with 400 where the problem document has 422, as OpenAI's clients
expect.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dynamic_lora_adapters import composition, saved
from dynamic_lora_adapters import errors as adapter_errors
from dynamic_lora_adapters.json_file import DuplicateKey, unique_keys
from dynamic_lora_server import errors
from dynamic_lora_server.disconnect import ClientDisconnected
from dynamic_lora_server.generation import SamplingParams
from dynamic_lora_server.schemas.openai import ErrorAnswer, ErrorBody
from dynamic_lora_server.schemas.problem import Problem
from dynamic_lora_server.sources import SourceUnavailable
from dynamic_lora_server.uploads import JSON, media_type

PROBLEM_MEDIA_TYPE = "application/problem+json"
NOT_READY_RETRY_SECONDS = 5
_LOGGED = (500, 502, 507)  # a server that loads or shuts down, 503, says so itself
# Errors quote names out of uploads, which may be as long as the files.
_MAX_SENTENCE = 2000

W = TypeVar("W", bound=BaseModel)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of the table: the stable slug, its title and its status.

    `code` is OpenAI's code where it has one of its own for the case.
    """

    slug: str
    title: str
    status: int
    code: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An error ready to be written on either wire."""

    kind: Kind
    detail: str
    field: str | None = None
    fix: str | None = None
    near: Sequence[str] = ()
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


# An error takes the row of its nearest class; a test asks that every class has one.
TABLE: Mapping[type[Exception], Kind] = {
    errors.InvalidParameter: Kind("invalid-parameter", "Invalid parameter", 422),
    errors.ContextOverflow: Kind(
        "context-overflow", "Request longer than the context", 422, "context_length_exceeded"
    ),
    errors.QueueFull: Kind("queue-full", "Too many requests wait", 429, "rate_limit_exceeded"),
    errors.NotReady: Kind("not-ready", "Not ready", 503),
    errors.EngineFailed: Kind("engine-failed", "The engine failed", 500),
    errors.UnsupportedModel: Kind("unsupported-model", "Unsupported base model", 500),
    errors.ServerError: Kind("server-error", "Server error", 500),
    SourceUnavailable: Kind("source-unavailable", "Adapter source unavailable", 502),
    adapter_errors.AdapterNotFound: Kind(
        "adapter-not-found", "Adapter not found", 404, "model_not_found"
    ),
    composition.VersionNotFound: Kind(
        "version-not-found", "Adapter version not found", 404, "model_not_found"
    ),
    composition.InvalidComposition: Kind("invalid-composition", "Invalid composition", 422),
    saved.CompositionNotFound: Kind("composition-not-found", "Composition not found", 404),
    saved.NameTaken: Kind("name-taken", "Name taken", 409),
    adapter_errors.InvalidAdapterName: Kind("invalid-adapter-name", "Invalid adapter name", 422),
    adapter_errors.AdapterTooLarge: Kind("adapter-too-large", "Adapter too large", 413),
    adapter_errors.UnsafeArchive: Kind("unsafe-archive", "Unsafe archive", 422),
    adapter_errors.InvalidAdapter: Kind("invalid-adapter", "Invalid adapter", 422),
    adapter_errors.UnsupportedAdapter: Kind("unsupported-adapter", "Unsupported adapter", 422),
    adapter_errors.IncompatibleAdapter: Kind("incompatible-adapter", "Incompatible adapter", 422),
    adapter_errors.AdapterCapacityError: Kind(
        "adapter-capacity", "Adapter exceeds the memory for adapters", 422
    ),
    adapter_errors.StoreFailed: Kind("store-failed", "The store cannot be written", 507),
    adapter_errors.AdapterError: Kind("adapter-error", "Adapter error", 422),
    ClientDisconnected: Kind("client-disconnected", "Client disconnected", 499),
    ClientDisconnect: Kind("client-disconnected", "Client disconnected", 499),
    Exception: Kind("internal-error", "Internal error", 500),
}
MALFORMED_JSON = Kind("malformed-json", "Malformed JSON", 400)
UNSUPPORTED_MEDIA_TYPE = Kind("unsupported-media-type", "Unsupported media type", 415)
INVALID_REQUEST = Kind("invalid-request", "Invalid request", 422)
BODY_TOO_LARGE = Kind("body-too-large", "Request body too large", 413)
MALFORMED_BODY = Kind("malformed-body", "Malformed body", 400)
NOT_FOUND = Kind("not-found", "Not found", 404)
METHOD_NOT_ALLOWED = Kind("method-not-allowed", "Method not allowed", 405)
# Where the framework says no more than the status' name.
_DETAILS: Mapping[int, str] = {
    404: "No route has this path; GET /openapi.json lists them.",
    405: "This path does not take this method; the Allow header names those that it takes.",
}
# What /v1 calls the fields that errors name.
_OPENAI_FIELDS: Mapping[str, str] = {
    "adapter": "model",
    "inputs": "prompt",
    "max_new_tokens": "max_tokens",
}
_GENERATE_PATHS = ("/", "/generate", "/generate_stream")
# What these have in `parameters`, of the names that errors have for it.
_PARAMETERS = frozenset({*(one.name for one in dataclasses.fields(SamplingParams)), "n", "stop"})
_BY_STATUS: Mapping[int, Kind] = {
    kind.status: kind
    for kind in (
        MALFORMED_BODY,
        NOT_FOUND,
        METHOD_NOT_ALLOWED,
        BODY_TOO_LARGE,
        UNSUPPORTED_MEDIA_TYPE,
    )
}
# Faults that the framework finds; no class of ours stands for them.
FRAMEWORK_KINDS: tuple[Kind, ...] = (*_BY_STATUS.values(), MALFORMED_JSON, INVALID_REQUEST)


def install(app: FastAPI) -> None:
    """Make every error of `app` an answer of this table."""
    for error in (*TABLE, RequestValidationError, HTTPException):
        app.add_exception_handler(error, _handle)


def stream_fault(error: Exception) -> Fault:
    """What is wrong, for an answer that has begun; logged, as no handler will see it."""
    fault = fault_of(error)
    if fault.kind.status in _LOGGED:
        _log.error("a stream broke off: %s", error, exc_info=error)
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
    if fault.kind.status in _LOGGED:
        _log.error("%s %s: %s", request.method, request.url.path, error)
    return answer(fault, path=request.url.path)


def fault_of(error: Exception, *, content_type: str = "application/json") -> Fault:
    """What is wrong, from the error; an unforeseen error tells the client nothing of itself."""
    if isinstance(error, RequestValidationError):
        return _validation_fault(error.errors(), content_type)
    if isinstance(error, HTTPException):
        return _http_fault(error)
    kind = next(TABLE[cls] for cls in type(error).__mro__ if cls in TABLE)
    if isinstance(error, errors.ServerError | adapter_errors.AdapterError):
        return Fault(
            kind=kind,
            detail=_capped(error.message) or "",
            field=_capped(error.field),
            fix=_capped(error.fix),
            near=getattr(error, "near", ()),
            headers=_retry_after(error),
        )
    return Fault(kind=kind, detail="The server met an error of its own; its log has the details.")


def answer(fault: Fault, *, path: str) -> Response:
    """The HTTP answer of a fault, in the form of the API that `path` belongs to."""
    if path.startswith("/v1/"):
        return Response(
            _dump(openai_error(fault)),
            status_code=_openai_status(fault.kind.status),
            media_type="application/json",
            headers=fault.headers,
        )
    if fault.field in _PARAMETERS and path in _GENERATE_PATHS:
        fault = dataclasses.replace(fault, field=f"parameters.{fault.field}")
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
        near=list(fault.near) or None,
    ).model_dump(exclude_none=True)


def openai_error(fault: Fault) -> dict[str, Any]:
    """OpenAI's error object of a fault."""
    server_side = fault.kind.status >= HTTPStatus.INTERNAL_SERVER_ERROR
    return ErrorAnswer(
        error=ErrorBody(
            message=_sentence(fault),
            type="server_error" if server_side else "invalid_request_error",
            param=_OPENAI_FIELDS.get(fault.field or "", fault.field),
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


def _retry_after(error: Exception) -> dict[str, str]:
    if isinstance(error, errors.QueueFull):
        return {"Retry-After": str(error.retry_after)}
    if isinstance(error, errors.NotReady):
        return {"Retry-After": str(NOT_READY_RETRY_SECONDS)}
    return {}


def _http_fault(error: HTTPException) -> Fault:
    status = error.status_code
    unlisted = Kind(f"http-{status}", HTTPStatus(status).phrase, status)
    detail = _DETAILS.get(status) if error.detail == HTTPStatus(status).phrase else None
    detail = _unreadable(error.__cause__) or detail
    return Fault(
        kind=_BY_STATUS.get(status, unlisted),
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
        field=_path(first["loc"]),
        fix="GET /openapi.json has every field with the values it takes.",
    )


def _is_json(content_type: str) -> bool:
    kind = media_type(content_type)
    return kind == JSON or kind.endswith("+json")


def _describe(faults: Sequence[Mapping[str, Any]]) -> str:
    """One clause per field; a field of several accepted forms names what each would need."""
    clauses: dict[str, list[str]] = {}
    for fault in faults:
        reasons = clauses.setdefault(_path(fault["loc"]), [])
        reason = _reason(fault)
        if reason not in reasons:
            reasons.append(reason)
    return "; ".join(f"{path}: {', or '.join(reasons)}" for path, reasons in clauses.items()) + "."


def _reason(fault: Mapping[str, Any]) -> str:
    if fault["type"] == "extra_forbidden":
        return "is not a field of this request"
    return str(fault["msg"]).removeprefix("Value error, ")


def _path(location: Sequence[str | int]) -> str:
    """`parameters.stop.0` from pydantic's location, without its names for a union's members."""
    parts: list[str] = []
    for part in location[1:]:
        name = str(part)
        if name in {"str", "constrained-str"} or "[" in name:
            break
        parts.append(name)
    return ".".join(parts) or str(location[0])
