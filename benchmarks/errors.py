"""What a measurement can fail with.

BenchmarkError
├── InvalidWorkload    an option has no meaning
├── RequestFailed      one request was refused, broke off, or came short
└── PeerUnavailable    a peer cannot be installed or started here
"""


class BenchmarkError(Exception):
    """A measurement could not be made; the text says why."""


class InvalidWorkload(BenchmarkError):
    """An option of the workload has no meaning."""


class RequestFailed(BenchmarkError):
    """One request was refused, broke off, or gave another number of tokens than asked."""


class PeerUnavailable(BenchmarkError):
    """A peer cannot be installed or started on this machine."""
