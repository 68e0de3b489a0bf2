"""Errors that a request to the server can meet.

    ServerError
    ├── InvalidParameter       a field of the request has a value that cannot be used
    ├── ContextOverflow        prompt and max_new_tokens exceed the context window
    ├── Unauthorized           the request carries no key, or an unknown one
    ├── Forbidden              the key is known, but not allowed to do this
    ├── QueueFull              too many requests wait; try again later
    ├── NotReady               the model is still loading
    ├── EngineFailed           the step loop broke on this request or stopped
    ├── GrammarFailed          the request's grammar could be followed no further
    └── UnsupportedModel       the base model cannot be served exactly

Adapter errors are in `dynamic_lora_adapters.errors`; HTTP statuses for both
are in `dynamic_lora_server.http.fault_kinds`. Imports no torch.
"""


class ServerError(Exception):
    """Base of all errors of this package; `field` names the request field at fault."""

    def __init__(self, message: str, *, field: str | None = None, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.fix = fix


class InvalidParameter(ServerError):
    """A request field has a value that cannot be used."""


class ContextOverflow(ServerError):
    """Prompt plus requested tokens do not fit in the context window."""


class Unauthorized(ServerError):
    """The route needs a key. `given`: whether the request carried one, though an unknown one."""

    def __init__(self, message: str, *, given: bool) -> None:
        super().__init__(message, fix="Send one in the header Authorization: Bearer KEY.")
        self.given = given


class Forbidden(ServerError):
    """The key is one of the server's, but not one that may change adapters."""


class CrossOrigin(Forbidden):
    """A browser sent it for a page of an origin that is not allowed to."""


class QueueFull(ServerError):
    """The waiting queue is full; `retry_after` is the advised pause in seconds."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, fix=f"Try again in {retry_after} s.")
        self.retry_after = retry_after


class NotReady(ServerError):
    """The model is not loaded yet, or the server is shutting down."""


class EngineFailed(ServerError):
    """The engine could not finish the request; other requests are not affected."""


class GrammarFailed(ServerError):
    """A grammar that was accepted could be followed no further in an answer."""


class UnsupportedModel(ServerError):
    """The base model cannot be served exactly by this engine; the message says why."""
