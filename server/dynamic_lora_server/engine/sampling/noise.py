"""Random numbers that depend on a key and a column alone, made where they are needed.

Each is a hash of the two, SplitMix64's (Steele, Lea and Flood 2014): no state, nothing to
copy, the same bits on every device.
"""

import struct
from collections.abc import Sequence
from hashlib import blake2b

import torch

from dynamic_lora_adapters.transfer import to_device

_GAMMA = 0x9E3779B97F4A7C15
_MIXERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
# The bits of a number that decide: the smallest is 2^-41, and what is beyond float32 is rounded.
_BITS = 40
_BELOW_ONE = 1 - 2**-24


def draw_key(seed: int, index: int) -> int:
    """The key of draw `index` of a sequence: 64 bits of BLAKE2b of both."""
    digest = blake2b(struct.pack("<QQ", seed, index), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def gumbel(keys: Sequence[int], size: int, device: torch.device) -> torch.Tensor:
    """Standard Gumbel noise [num_keys, size], float32, one row for each key."""
    bits = _splitmix(keys, size, device)
    bits.bitwise_right_shift_(64 - _BITS).bitwise_and_(2**_BITS - 1)
    uniform = bits.float().mul_(2.0**-_BITS).add_(2.0 ** -(_BITS + 1)).clamp_(max=_BELOW_ONE)
    # -log(-log(1 - u)): the large ones come of small u, which are fine grained.
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _splitmix(keys: Sequence[int], size: int, device: torch.device) -> torch.Tensor:
    """The first `size` numbers of SplitMix64 from each key, [num_keys, size], as int64."""
    starts = to_device([_signed(key) for key in keys], device, torch.int64)
    columns = torch.arange(1, size + 1, device=device)
    bits = columns.mul_(_signed(_GAMMA)) + starts[:, None]
    for shift, factor in _MIXERS:
        bits.bitwise_xor_(_shifted(bits, shift)).mul_(_signed(factor))
    return bits.bitwise_xor_(_shifted(bits, _LAST_SHIFT))


def _shifted(bits: torch.Tensor, number: int) -> torch.Tensor:
    """To the right, with zeros from the left: torch repeats the sign."""
    return bits.bitwise_right_shift(number).bitwise_and_(2 ** (64 - number) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned number."""
    return value - 2**64 if value >= 2**63 else value
