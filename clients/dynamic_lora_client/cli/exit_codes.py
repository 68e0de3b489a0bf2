"""What the command's exit status tells a shell."""

from enum import IntEnum

from dynamic_lora_client.errors import (
    Busy,
    DynamicLoraError,
    InvalidArgument,
    InvalidResponse,
    NotFound,
    StreamBroken,
    TransportError,
    Unavailable,
)


class ExitCode(IntEnum):
    """The command's exit statuses."""

    OK = 0
    REFUSED = 1  # the server refused the request, or failed at it; or a disk is full
    USAGE = 2
    MISSING_DEPENDENCY = 3
    UNREACHABLE = 4
    NOT_FOUND = 5
    BUSY = 6  # also: not ready yet
    INTERRUPTED = 130  # what shells use for SIGINT
    UNREAD = 141  # what shells use for SIGPIPE


SUMMARY = (
    "Exit codes: 0 ok, 1 the server refused or failed, or the output cannot be written, 2 usage, "
    "3 missing dependency, 4 cannot reach the server, 5 not found, 6 busy or not ready, "
    "130 stopped by the user, 141 nobody reads the output on."
)

_BY_ERROR: tuple[tuple[type[DynamicLoraError], ExitCode], ...] = (
    (InvalidArgument, ExitCode.USAGE),
    (TransportError, ExitCode.UNREACHABLE),
    (InvalidResponse, ExitCode.UNREACHABLE),
    (NotFound, ExitCode.NOT_FOUND),
    (Busy, ExitCode.BUSY),
    (Unavailable, ExitCode.BUSY),
)


def exit_code(error: DynamicLoraError) -> ExitCode:
    """The status that an error ends the command with."""
    if isinstance(error, StreamBroken) and error.error_type is None:
        return ExitCode.UNREACHABLE
    return next((code for kind, code in _BY_ERROR if isinstance(error, kind)), ExitCode.REFUSED)
