"""What a limit is, without measuring it. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The machine's limit for one number of clients at one moment (see `limit.py`).

    `step_s` is one decoding step, `prefill_s` the prompts of all clients. `bound` says what
    `step_s` comes from: `products` or `memory`. `gbytes_per_s` is the measured read.
    """

    num_clients: int
    step_s: float
    prefill_s: float
    gbytes_per_s: float
    bound: str
    tokens_per_s: float


def tokens_per_s(
    *, num_clients: int, num_output_tokens: int, step_s: float, prefill_s: float
) -> float:
    """Output tokens per second when all clients' requests run together from begin to end.

    The prompts' products give each client its first token.
    """
    seconds = prefill_s + (num_output_tokens - 1) * step_s
    return num_clients * num_output_tokens / seconds


def pieces(num_tokens: int, most: int) -> list[int]:
    """Prompt tokens cut into pieces of at most `most` rows."""
    whole, rest = divmod(num_tokens, most)
    return [most] * whole + ([rest] if rest else [])
