"""Rotary tables: exact at any place, in the layout of the checkpoints, and from the published frequencies."""

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
def test_angles_are_exact_past_a_million_million_tokens(rope):
    """Against arithmetic with 60 digits. Observed: 2.5e-16."""
    frequencies = rope.frequencies(100)
    cos, sin = _table(rope, torch.tensor([PLACES]), 100, torch.float64)
    half = len(frequencies)
    assert cos.shape == sin.shape == (1, 1, len(PLACES), 2 * half)
    with mpmath.workdps(60):
        for i, frequency in enumerate(frequencies.double().tolist()):
            for t, place in enumerate(PLACES):
                angle = mpmath.mpf(frequency) * place
                for column, sign in ((i, -1), (i + half, 1)):
                    assert (
                        abs(cos[0, 0, t, column] - float(mpmath.cos(angle)) * rope.attention_factor) < 1e-12
                    )
                    assert (
                        abs(sin[0, 0, t, column] - sign * float(mpmath.sin(angle)) * rope.attention_factor)
                        < 1e-12
                    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_smaller_types_get_the_exact_values_rounded_once(dtype):
    places = torch.tensor([PLACES])
    exact = _table(Rope(10000.0, 64), places, 1, torch.float64)
    for got, wanted in zip(_table(Rope(10000.0, 64), places, 1, dtype), exact, strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, wanted.to(dtype))


def test_float32_angles_are_what_transformers_computes_and_are_wrong_far_away():
    rope = Rope(10000.0, 128)
    places = torch.tensor([[0, 1, 100, 4095, 10**6]])
    exact, _ = _table(rope, places, 1, torch.float64)
    rounded, _ = _table(replace(rope, float32_angles=True), places, 1, torch.float32)
    angles = places.float()[0, :, None] * rope.frequencies(1)
    assert torch.equal(rounded[0, 0, :, :64], angles.cos())
    worst = (rounded - exact).abs().amax((0, 1, 3))
    assert worst[0] == 0
    assert worst[3] > 5e-5
    assert worst[4] > 1e-2


def test_dimension_i_turns_with_dimension_i_plus_half_and_the_rest_passes():
    x = torch.arange(1.0, 9.0, dtype=torch.float64).view(1, 1, 1, 8)
    quarter = torch.tensor([[1]]), Rope(1.0, 6)  # every pair turns by one radian per place
    turned = _rotate(x, _table(quarter[1], quarter[0], 1, torch.float64)).flatten()
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
    assert turned.tolist() == pytest.approx(expected, abs=1e-14)


def test_an_odd_number_of_dimensions_turns_one_more():
    rope = Rope(10000.0, 5)
    assert len(rope.frequencies(1)) == 3
    cos, _ = _table(rope, torch.tensor([[7]]), 1, torch.float64)
    assert cos.shape[-1] == 6


def test_only_differences_of_places_matter():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)
    rope = Rope(10000.0, 64)

    def score(query, key):
        tables = [_table(rope, torch.tensor([[place]]), 1, torch.float64) for place in (query, key)]
        return (_rotate(q, tables[0]) * _rotate(k, tables[1])).sum().item()

    wanted = score(1000, 17)
    for shift in (1, 10**6, 10**12, 2**48 - 2000):
        assert score(1000 + shift, 17 + shift) == pytest.approx(wanted, abs=1e-12)


def test_the_sink_query_is_made_only_where_it_differs():
    places = torch.tensor([[5, 6]])
    step = Step(places, places, places, places, places, None, sinks=0, rope_length=8)
    one = rotation(Rope(10000.0, 8), step, torch.float64)
    q = torch.randn(1, 2, 2, 8, dtype=torch.float64)
    assert one.queries(q)[1] is None
    other = rotation(
        Rope(10000.0, 8), replace(step, sinks=1, sink_query_place=torch.tensor([[3, 3]])), torch.float64
    )
    assert torch.equal(other.queries(q)[0], one.queries(q)[0])
    assert not torch.equal(other.queries(q)[1], other.queries(q)[0])
    assert torch.equal(other.keys(q), one.keys(q))


# The frequencies, computed a second time from their publications in exact fractions and 64-bit logarithms.


def plain(theta=10000.0, dim=8):
    return [theta ** (-2 * i / dim) for i in range(dim // 2)]


def close(rope, span, expected):
    assert rope.frequencies(span).dtype == torch.float32
    assert rope.frequencies(span).tolist() == pytest.approx(expected, rel=1e-6)


def test_default_linear_and_partial_frequencies():
    for span in (1, 10**6):
        close(ROPES["default"], span, plain())
        close(ROPES["linear"], span, [f / 4 for f in plain()])
        close(ROPES["partial"], span, plain(dim=4))


def test_dynamic_frequencies_grow_with_the_span_beyond_the_trained_positions():
    rope = ROPES["dynamic"]  # factor 2, trained for 8
    close(rope, 8, plain())
    for span in (9, 16, 1000):
        stretch = Fraction(2 * span, 8) - 1
        close(rope, span, plain(10000.0 * float(stretch) ** (8 / 6)))


def test_longrope_switches_its_divisors_beyond_the_original_length():
    rope = ROPES["longrope"]
    assert isinstance(rope, LongRope)
    close(rope, 8, [f / d for f, d in zip(plain(), rope.short_factor, strict=True)])
    close(rope, 9, [f / d for f, d in zip(plain(), rope.long_factor, strict=True)])


def test_llama3_frequencies_are_kept_slowed_or_between():
    rope = ROPES[
        "llama3"
    ]  # factor 8, original 64, factors 1 and 4: waves of 16 and less kept, of 64 and more slowed
    expected = []
    for f in plain():
        wave = 2 * math.pi / f
        share = min(1.0, max(0.0, (64 / wave - 1) / (4 - 1)))
        expected.append(f * share + f / 8 * (1 - share))
    assert expected[0] == plain()[0]
    assert expected[-1] == plain()[-1] / 8
    close(rope, 1, expected)


def test_yarn_frequencies_ramp_between_the_slow_and_the_fast():
    rope = ROPES["yarn"]  # factor 4, original 32
    low = max(0, math.floor(8 * math.log(32 / (32 * 2 * math.pi)) / (2 * math.log(10000.0))))
    high = min(7, math.ceil(8 * math.log(32 / (1 * 2 * math.pi)) / (2 * math.log(10000.0))))
    expected = []
    for i, f in enumerate(plain()):
        slowed = min(1.0, max(0.0, (i - low) / (high - low)))
        expected.append(f / 4 * slowed + f * (1 - slowed))
    close(rope, 1, expected)


def test_how_long_a_text_may_be_is_stretched_by_the_rope():
    lengths = {name: rope.trained_length(64) for name, rope in ROPES.items()}
    assert lengths == {
        "default": 64, "linear": 256, "llama3": 64, "yarn": 128, "dynamic": 128, "longrope": 64,
        "partial": 64, "partial, odd": 64, "fast": 64,
    }  # fmt: skip
