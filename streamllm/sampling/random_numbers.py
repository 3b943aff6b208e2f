"""Random numbers without a generator's state: a pure function of a seed and a place in the stream."""

from __future__ import annotations

import torch

_BITS_64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def uniform(seed: int, place: int) -> float:
    """A number in [0, 1) for the token at a place of a stream: a multiple of 2^-53, the same on every device.

    It is output number `place` of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators"), started from the first output of a SplitMix64 that is started from `seed`. The second
    generator is there because the outputs for `seed + 1` must not be a shifted copy of those for `seed`.

    seed: its lowest 64 bits count, so -1 and 2^64 - 1 are the same seed. place: 0 or above.
    """
    key = _mix(seed + _GOLDEN_GAMMA)
    return (_mix(key + (place + 1) * _GOLDEN_GAMMA) >> 11) * 2.0**-53


def fresh_seed() -> int:
    """A seed of 63 bits from torch's global generator, so `torch.manual_seed` makes it repeatable."""
    return int(torch.randint(0, (1 << 63) - 1, (), dtype=torch.int64, device="cpu"))


def _mix(value: int) -> int:
    """The output function of SplitMix64."""
    value &= _BITS_64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _BITS_64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _BITS_64
    return value ^ value >> 31
