"""Everything that can go wrong between a caller and a Dynamic LoRA server.

    DynamicLoraError
    ├── InvalidArgument        an argument cannot be used; nothing was sent
    ├── TransportError         no answer: the connection failed or was lost
    │   └── Timeout            no answer within the connect or read timeout
    ├── InvalidResponse        the answer is not one of this API
    ├── StreamBroken           a stream began and did not reach its end
    └── ApiError               the server answered with an error status
        ├── BadRequest         4xx: the request has to change
        ├── AccessDenied       401, 403: no key, an unknown one, or not one for this
        ├── NotFound           404: nothing at this address
        │   └── AdapterNotFound    no adapter of this name
        ├── Busy               429: the queue is full
        ├── Unavailable        503: the model is loading or the server is closing
        └── ServerFault        any other 5xx

An error's `fix`, where there is one, says what to do about it.
"""

from dataclasses import dataclass


class DynamicLoraError(Exception):
    """Base of all errors of this package."""

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(f"{message} {fix}" if fix else message)
        self.message = message
        self.fix = fix


class InvalidArgument(DynamicLoraError, ValueError):
    """An argument cannot be used; nothing was sent."""


class TransportError(DynamicLoraError):
    """The connection could not be made or was lost before the answer."""


class Timeout(TransportError):
    """The server did not accept the connection, or did not answer, in time."""


class InvalidResponse(DynamicLoraError):
    """The answer is not one of this API; perhaps another server listens there."""


class StreamBroken(DynamicLoraError):
    """A stream began and ended before its last event.

    `error_type` is set when the server itself reported the error, and None
    when the connection was lost.
    """

    def __init__(self, message: str, *, error_type: str | None = None) -> None:
        super().__init__(message)
        self.error_type = error_type


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A problem document (RFC 9457) as the server sent it.

    `type` is stable and meant for programs; `field` names the request field at
    fault; `near` holds the names closest to one that was not found.
    """

    type: str
    title: str
    status: int
    detail: str
    field: str | None = None
    fix: str | None = None
    near: tuple[str, ...] = ()


class ApiError(DynamicLoraError):
    """The server answered with an error status; `problem` is what it said.

    `request_id` is what the server's log calls the request.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(problem.detail, fix=problem.fix)
        self.problem = problem
        self.retry_after = retry_after
        self.request_id = request_id

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.problem.status


class BadRequest(ApiError):
    """The server refused the request as it stands (4xx)."""


class AccessDenied(ApiError):
    """The server wants a key, or another one than it was sent (401, 403)."""


class NotFound(ApiError):
    """Nothing is served at this address (404)."""


class AdapterNotFound(NotFound):
    """No adapter of this name is known; `near` holds the closest names."""

    @property
    def near(self) -> tuple[str, ...]:
        """The names closest to the one asked for."""
        return self.problem.near


class Busy(ApiError):
    """The server's queue is full (429); `retry_after` is its advice in seconds."""


class Unavailable(ApiError):
    """The model is loading or the server is closing (503)."""


class ServerFault(ApiError):
    """The server failed on its own account (5xx)."""
