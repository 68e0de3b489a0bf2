"""Error answers read into errors."""

from http import HTTPStatus

import httpx

from dynamic_lora_client.documents import Document
from dynamic_lora_client.errors import (
    AccessDenied,
    AdapterNotFound,
    ApiError,
    BadRequest,
    Busy,
    InvalidResponse,
    NotFound,
    Problem,
    ServerFault,
    Unavailable,
)
from dynamic_lora_client.retry import retry_after

_NUM_CHARS_QUOTED = 200  # of an answer that is no problem document

_BY_STATUS: dict[int, type[ApiError]] = {
    HTTPStatus.UNAUTHORIZED: AccessDenied,
    HTTPStatus.FORBIDDEN: AccessDenied,
    HTTPStatus.NOT_FOUND: NotFound,
    HTTPStatus.TOO_MANY_REQUESTS: Busy,
    HTTPStatus.SERVICE_UNAVAILABLE: Unavailable,
}


def to_error(response: httpx.Response) -> ApiError:
    """The error for an answer with an error status, whether or not it explains itself."""
    problem = _read_problem(response)
    return _error_class(problem)(
        problem,
        retry_after=retry_after(response),
        request_id=response.headers.get("x-request-id"),
    )


def _error_class(problem: Problem) -> type[ApiError]:
    if problem.type.endswith(("/adapter-not-found", "/version-not-found")):
        return AdapterNotFound
    is_fault = problem.status >= HTTPStatus.INTERNAL_SERVER_ERROR
    return _BY_STATUS.get(problem.status, ServerFault if is_fault else BadRequest)


def _read_problem(response: httpx.Response) -> Problem:
    title = response.reason_phrase or "Error"
    try:
        document = Document.parse(response.content)
        return Problem(
            type=document.optional_text("type") or "about:blank",
            title=document.optional_text("title") or title,
            status=response.status_code,
            detail=document.text("detail"),
            field=document.optional_text("field"),
            fix=document.optional_text("fix"),
            near=document.texts("near"),
        )
    except InvalidResponse:
        # A proxy in between, or another server, answers in its own words.
        said = response.text.strip()[:_NUM_CHARS_QUOTED]
        detail = f"The server answered {response.status_code} {title}" + (
            f": {said}" if said else "."
        )
        return Problem(type="about:blank", title=title, status=response.status_code, detail=detail)
