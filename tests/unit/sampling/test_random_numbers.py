"""`uniform`: known values, and statistics over places and over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from streamllm.sampling import fresh_seed, uniform

COUNT = 20_000
SEQUENCES: dict[str, Callable[[int], float]] = {
    "places": lambda i: uniform(0, i),
    "distant places": lambda i: uniform(7, 10**12 + i),
    "seeds": lambda i: uniform(i, 0),
    "seeds at a later place": lambda i: uniform(i, 1000),
    "seeds and places": lambda i: uniform(i, i),
    # SplitMix64 adds this number for each place, so without a hash of the seed, all of these would be equal.
    "seeds apart by the increment": lambda i: uniform(i * 0x9E3779B97F4A7C15, COUNT - i),
}


def split_mix(state: int) -> list[int]:
    """The first outputs of SplitMix64, with its state as the reference code keeps it."""
    outputs = []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        outputs.append(z ^ (z >> 31))
    return outputs


def test_the_numbers_are_outputs_of_split_mix() -> None:
    assert split_mix(1234567)[:2] == [6457827717110365317, 3203168211198807973]  # published test vector
    for seed in (0, 1, 2**64 - 1):
        outputs = split_mix(split_mix(seed)[0])
        assert [uniform(seed, place) for place in range(3)] == [(x >> 11) / 2**53 for x in outputs]


def test_seeds_count_modulo_64_bits() -> None:
    assert uniform(-1, 5) == uniform(2**64 - 1, 5) != uniform(2**63 - 1, 5)


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_numbers_are_uniform_and_neighbours_are_independent(name: str) -> None:
    numbers = [SEQUENCES[name](i) for i in range(COUNT)]
    assert all(0 <= x < 1 for x in numbers)
    assert len(set(numbers)) == COUNT
    assert chi_square([int(64 * x) for x in numbers], 64) < limit(63)
    pairs = [int(16 * x) * 16 + int(16 * y) for x, y in pairwise(numbers)]
    assert chi_square(pairs, 256) < limit(255)
    for distance in (1, 2, 3, 64):
        products = [(x - 0.5) * (y - 0.5) for x, y in zip(numbers, numbers[distance:], strict=False)]
        assert abs(12 * sum(products) / len(products)) < 4 / math.sqrt(len(products))


def test_the_lowest_bits_are_uniform_too() -> None:
    for shift in (53, 52, 30):
        bits = [int(uniform(3, i) * 2**shift) % 8 for i in range(COUNT)]
        assert chi_square(bits, 8) < limit(7)


def test_a_fresh_seed_follows_torchs_global_generator() -> None:
    torch.manual_seed(4)
    seeds = [fresh_seed() for _ in range(3)]
    torch.manual_seed(4)
    assert [fresh_seed() for _ in range(3)] == seeds
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)


def chi_square(values: list[int], bins: int) -> float:
    counts = torch.tensor(values).bincount(minlength=bins).double()
    expected = len(values) / bins
    return float(((counts - expected) ** 2 / expected).sum())


def limit(degrees: int) -> float:
    """What chi-square exceeds with a probability of about 1e-5 (Wilson and Hilferty)."""
    return float(degrees * (1 - 2 / (9 * degrees) + 4.26 * math.sqrt(2 / (9 * degrees))) ** 3)
