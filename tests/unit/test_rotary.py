"""Rotary tables: exact at any place, in the layout of the checkpoints, and with the published frequencies."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import mpmath
import pytest
import torch

from streamllm.models.rotary import LongRope, Rope, _rotate, _table, rotation
from streamllm.models.step import Step
from tests.laws.scenarios import ROPES

PLACES = [
    0,
    1,
    4095,
    2**20 - 1,
    2**20,
    10**6,
    10**9,
    10**9 + 7,
    10**12,
    10**12 + 123_456_789,
    2**48 - 1,
    2**49 - 1,
]


@pytest.mark.parametrize(
    "rope", [Rope(10000.0, 128), Rope(500000.0, 64), Rope(3.0, 8), *ROPES.values()], ids=str
)
def test_cosines_and_sines_are_exact_at_any_place(rope):
    """The expected values have 60 digits."""
    frequencies = rope.frequencies(100)
    cos, sin = _table(rope, torch.tensor([PLACES]), 100, torch.float64)
    half = len(frequencies)
    assert cos.shape == sin.shape == (1, 1, len(PLACES), 2 * half)
    with mpmath.workdps(60):
        for i, frequency in enumerate(frequencies.double().tolist()):
            for t, place in enumerate(PLACES):
                angle = mpmath.mpf(frequency) * place
                cosine = float(mpmath.cos(angle)) * rope.attention_factor
                sine = float(mpmath.sin(angle)) * rope.attention_factor
                for column, sign in ((i, -1), (i + half, 1)):
                    assert abs(cos[0, 0, t, column] - cosine) < 1e-12
                    assert abs(sin[0, 0, t, column] - sign * sine) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_smaller_dtypes_have_the_exact_values_rounded_once(dtype):
    places = torch.tensor([PLACES])
    exact = _table(Rope(10000.0, 64), places, 1, torch.float64)
    for got, wanted in zip(_table(Rope(10000.0, 64), places, 1, dtype), exact, strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, wanted.to(dtype))


def test_float32_angles_equal_those_of_transformers_and_lose_accuracy_at_distant_places():
    rope = Rope(10000.0, 128)
    places = torch.tensor([[0, 1, 100, 4095, 10**6]])
    exact, _ = _table(rope, places, 1, torch.float64)
    rounded, _ = _table(replace(rope, float32_angles=True), places, 1, torch.float32)
    angles = places.float()[0, :, None] * rope.frequencies(1)
    assert torch.equal(rounded[0, 0, :, :64], angles.cos())
    errors = (rounded - exact).abs().amax((0, 1, 3))
    assert errors[0] == 0
    assert errors[3] > 5e-5
    assert errors[4] > 1e-2


def test_dimensions_i_and_i_plus_half_rotate_together_and_the_rest_is_unchanged():
    x = torch.arange(1.0, 9.0, dtype=torch.float64).view(1, 1, 1, 8)
    rope = Rope(1.0, 6)  # theta 1: every pair rotates by one radian per place
    rotated = _rotate(x, _table(rope, torch.tensor([[1]]), 1, torch.float64)).flatten()
    c, s = math.cos(1), math.sin(1)
    expected = [
        1 * c - 4 * s,
        2 * c - 5 * s,
        3 * c - 6 * s,
        4 * c + 1 * s,
        5 * c + 2 * s,
        6 * c + 3 * s,
        7,
        8,
    ]
    assert rotated.tolist() == pytest.approx(expected, abs=1e-14)


def test_an_odd_number_of_dimensions_is_rounded_up():
    rope = Rope(10000.0, 5)
    assert len(rope.frequencies(1)) == 3
    cos, _ = _table(rope, torch.tensor([[7]]), 1, torch.float64)
    assert cos.shape[-1] == 6


def test_scores_depend_only_on_differences_of_places():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)
    rope = Rope(10000.0, 64)

    def score(query, key):
        tables = [_table(rope, torch.tensor([[place]]), 1, torch.float64) for place in (query, key)]
        return (_rotate(q, tables[0]) * _rotate(k, tables[1])).sum().item()

    wanted = score(1000, 17)
    for shift in (1, 10**6, 10**12, 2**48 - 2000):
        assert score(1000 + shift, 17 + shift) == pytest.approx(wanted, abs=1e-12)


def test_there_is_a_sink_query_only_where_it_differs():
    places = torch.tensor([[5, 6]])
    step = Step(places, places, places, places, places, None, sinks=0, rope_length=8)
    without_sinks = rotation(Rope(10000.0, 8), step, torch.float64)
    q = torch.randn(1, 2, 2, 8, dtype=torch.float64)
    assert without_sinks.queries(q)[1] is None
    with_sinks = rotation(
        Rope(10000.0, 8), replace(step, sinks=1, sink_query_place=torch.tensor([[3, 3]])), torch.float64
    )
    assert torch.equal(with_sinks.queries(q)[0], without_sinks.queries(q)[0])
    assert not torch.equal(with_sinks.queries(q)[1], with_sinks.queries(q)[0])
    assert torch.equal(with_sinks.keys(q), without_sinks.keys(q))


# The frequencies, computed again from their publications, in float64


def default_frequencies(theta=10000.0, dim=8):
    return [theta ** (-2 * i / dim) for i in range(dim // 2)]


def assert_frequencies(rope, length, expected):
    assert rope.frequencies(length).dtype == torch.float32
    assert rope.frequencies(length).tolist() == pytest.approx(expected, rel=1e-6)


def test_default_linear_and_partial_frequencies():
    for length in (1, 10**6):
        assert_frequencies(ROPES["default"], length, default_frequencies())
        assert_frequencies(ROPES["linear"], length, [f / 4 for f in default_frequencies()])
        assert_frequencies(ROPES["partial"], length, default_frequencies(dim=4))


def test_dynamic_theta_grows_with_the_length_beyond_the_trained_one():
    rope = ROPES["dynamic"]  # factor 2, trained for 8
    assert_frequencies(rope, 8, default_frequencies())
    for length in (9, 16, 1000):
        growth = Fraction(2 * length, 8) - 1
        assert_frequencies(rope, length, default_frequencies(10000.0 * float(growth) ** (8 / 6)))


def test_longrope_uses_its_long_factors_beyond_the_original_length():
    rope = ROPES["longrope"]
    assert isinstance(rope, LongRope)
    assert_frequencies(
        rope, 8, [f / d for f, d in zip(default_frequencies(), rope.short_factor, strict=True)]
    )
    assert_frequencies(rope, 9, [f / d for f, d in zip(default_frequencies(), rope.long_factor, strict=True)])


def test_llama3_frequencies_are_unchanged_divided_or_interpolated():
    # Factor 8, original length 64, low and high factors 1 and 4: frequencies with wavelengths up to 16 are
    # unchanged, those with wavelengths from 64 on are divided by 8.
    rope = ROPES["llama3"]
    expected = []
    for f in default_frequencies():
        wavelength = 2 * math.pi / f
        unchanged = min(1.0, max(0.0, (64 / wavelength - 1) / (4 - 1)))
        expected.append(f * unchanged + f / 8 * (1 - unchanged))
    assert expected[0] == default_frequencies()[0]
    assert expected[-1] == default_frequencies()[-1] / 8
    assert_frequencies(rope, 1, expected)


def test_yarn_interpolates_low_frequencies_with_a_ramp():
    rope = ROPES["yarn"]  # factor 4, original 32
    low = max(0, math.floor(8 * math.log(32 / (32 * 2 * math.pi)) / (2 * math.log(10000.0))))
    high = min(7, math.ceil(8 * math.log(32 / (1 * 2 * math.pi)) / (2 * math.log(10000.0))))
    expected = []
    for i, f in enumerate(default_frequencies()):
        interpolated = min(1.0, max(0.0, (i - low) / (high - low)))
        expected.append(f / 4 * interpolated + f * (1 - interpolated))
    assert_frequencies(rope, 1, expected)


def test_trained_lengths_with_each_rope():
    lengths = {name: rope.trained_length(64) for name, rope in ROPES.items()}
    assert lengths == {
        "default": 64, "linear": 256, "llama3": 64, "yarn": 128, "dynamic": 128, "longrope": 64,
        "partial": 64, "partial, odd": 64, "fast": 64,
    }  # fmt: skip
