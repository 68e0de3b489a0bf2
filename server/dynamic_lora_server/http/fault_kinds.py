"""Every kind of error that this server answers with: its slug, its title, its status."""

from collections.abc import Mapping
from dataclasses import dataclass

from starlette.requests import ClientDisconnect

from dynamic_lora_adapters import errors as adapter_errors
from dynamic_lora_adapters.compositions import composition, saved
from dynamic_lora_server import errors
from dynamic_lora_server.http.disconnect import ClientDisconnected
from dynamic_lora_server.intake.sources import SourceUnavailable

_TGI_TYPES: Mapping[int, str] = {
    400: "validation",
    413: "validation",
    415: "validation",
    422: "validation",
    429: "overloaded",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of the table: the stable slug, its title and its status.

    `code` is OpenAI's code where it has one of its own for the case.
    """

    slug: str
    title: str
    status: int
    code: str | None = None

    @property
    def error_type(self) -> str | None:
        """The class of errors by which TGI's and the Hub's clients choose an exception.

        None where they have none of their own and go by the status, as with a missing adapter.
        """
        if self.status >= 500:
            return "generation"
        return _TGI_TYPES.get(self.status)


# An error takes the row of its nearest class; a test asks that every class has one.
TABLE: Mapping[type[Exception], Kind] = {
    errors.InvalidParameter: Kind("invalid-parameter", "Invalid parameter", 422),
    errors.ContextOverflow: Kind(
        "context-overflow", "Request longer than the context", 422, "context_length_exceeded"
    ),
    errors.QueueFull: Kind("queue-full", "Too many requests wait", 429, "rate_limit_exceeded"),
    errors.Unauthorized: Kind("unauthorized", "No valid key", 401, "invalid_api_key"),
    errors.Forbidden: Kind("forbidden", "Not with this key", 403),
    errors.CrossOrigin: Kind("cross-origin", "Not from this page", 403),
    errors.NotReady: Kind("not-ready", "Not ready", 503),
    errors.EngineFailed: Kind("engine-failed", "The engine failed", 500),
    errors.GrammarFailed: Kind("grammar-failed", "The grammar leads nowhere", 422),
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
    adapter_errors.StoreFailed: Kind("store-failed", "The store cannot be used", 507),
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
BY_STATUS: Mapping[int, Kind] = {
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
FRAMEWORK_KINDS: tuple[Kind, ...] = (*BY_STATUS.values(), MALFORMED_JSON, INVALID_REQUEST)
