"""rope_theta, rope_scaling and rope_parameters of config.json, old and new, -> Rope."""

from __future__ import annotations

import math

from streamllm.models import rotary
from streamllm.weights.config_reader import ConfigReader

TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
# Beyond these, frequencies are not finite in float32. Models have factors from 1 to 100.
LEAST_FACTOR, MOST_FACTOR = 1e-6, 1e300
LEAST_THETA, MOST_THETA = 1e-30, 1e300
MOST_ATTENTION_FACTOR = 1e4


def read_rope(
    config: ConfigReader, dim: int, theta_key: str, positions: int, match_transformers: bool
) -> rotary.Rope:
    """The rotary frequencies that a config asks for.

    A rope_scaling that is not empty replaces rope_parameters. In it, rope_type wins over type. Its keys win
    over the same keys of the config itself, except for original_max_position_embeddings.

    Args:
        dim: how many of a head's dimensions are rotated.
        theta_key: the name of the config's own rope_theta, outside rope_scaling.
        positions: max_position_embeddings.
        match_transformers: multiply place and frequency in float32, as transformers does.
    """
    new_spelling = config.inner("rope_parameters")
    scaling = (
        config.inner("rope_scaling") or new_spelling or ConfigReader({}, f"rope_scaling in {config.where}")
    )
    kind = scaling.choice("rope_type", scaling.choice("type", "default", TYPES), TYPES)
    theta = config.number(theta_key, 10000.0, LEAST_THETA, MOST_THETA)
    theta = scaling.number("rope_theta", theta, LEAST_THETA, MOST_THETA)
    plain = rotary.Rope(theta, dim, float32_angles=match_transformers)

    if kind == "default":
        return plain
    if kind == "linear":
        factor = _factor(scaling, kind, positions)
        return rotary.LinearRope(theta, dim, float32_angles=match_transformers, factor=factor)
    if kind == "dynamic":
        if dim <= 2:
            raise config.wrong("head dimension", dim, "more than 2 rotary dimensions with dynamic scaling")
        factor = _factor(scaling, kind, positions)
        return rotary.DynamicRope(
            theta, dim, float32_angles=match_transformers, factor=factor, positions=positions
        )

    if kind in ("yarn", "longrope") and dim % 2:
        raise scaling.wrong(
            "rope_type", kind, f"other types, because {dim} dimensions, an odd number, rotate"
        )
    original = scaling.size("original_max_position_embeddings", positions)
    original = config.size("original_max_position_embeddings", original)
    if kind == "llama3":
        return _llama3(scaling, plain, original)
    if kind == "yarn":
        scaling.require("factor", "rope_type yarn")  # but it may be null
    factor = _factor(scaling, kind, original, positions / original)
    if kind == "yarn":
        return _yarn(scaling, plain, factor, original)
    return _longrope(scaling, plain, factor, original)


def _llama3(scaling: ConfigReader, plain: rotary.Rope, original: int) -> rotary.Rope:
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
        scaling.require(name, "rope_type llama3")
    low, high = (
        scaling.number(name, 0.0, LEAST_FACTOR, MOST_FACTOR)
        for name in ("low_freq_factor", "high_freq_factor")
    )
    if not 0 < low < high:
        raise scaling.wrong("high_freq_factor", high, f"a number above low_freq_factor, {low}, above 0")
    return rotary.Llama3Rope(
        plain.theta,
        plain.dim,
        float32_angles=plain.float32_angles,
        factor=_factor(scaling, "llama3", original),
        low_freq_factor=low,
        high_freq_factor=high,
        original=original,
    )


def _yarn(scaling: ConfigReader, plain: rotary.Rope, factor: float, original: int) -> rotary.Rope:
    mscale, mscale_all_dim = (
        scaling.number(name, 0.0, 0.0, MOST_ATTENTION_FACTOR) for name in ("mscale", "mscale_all_dim")
    )
    if mscale and mscale_all_dim:
        attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
    else:
        attention_factor = _yarn_mscale(factor, 1.0)
    fast = scaling.number("beta_fast", 32.0, 0.0, MOST_FACTOR) or 32.0
    slow = scaling.number("beta_slow", 1.0, 0.0, MOST_FACTOR) or 1.0
    if not LEAST_FACTOR <= slow < fast:
        raise scaling.wrong("beta_fast", fast, f"a number above beta_slow, {slow}, above 0")
    if plain.theta == 1:
        raise scaling.wrong("rope_theta", plain.theta, "a number other than 1 with yarn")
    return rotary.YarnRope(
        plain.theta,
        plain.dim,
        attention_factor=scaling.number("attention_factor", attention_factor, 0.0, MOST_ATTENTION_FACTOR),
        float32_angles=plain.float32_angles,
        factor=factor,
        original=original,
        beta_fast=fast,
        beta_slow=slow,
        truncate=scaling.flag("truncate", True),
    )


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(scaling: ConfigReader, plain: rotary.Rope, factor: float, original: int) -> rotary.Rope:
    attention_factor = 1.0
    if factor > 1:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(max(original, 2)))
    return rotary.LongRope(
        plain.theta,
        plain.dim,
        attention_factor=scaling.number("attention_factor", attention_factor, 0.0, MOST_ATTENTION_FACTOR),
        float32_angles=plain.float32_angles,
        factor=factor,
        original=original,
        short_factor=_divisors(scaling, "short_factor", plain.dim),
        long_factor=_divisors(scaling, "long_factor", plain.dim),
    )


def _factor(scaling: ConfigReader, kind: str, length: int, default: float | None = None) -> float:
    """The factor by which `length` grows. Without a default, the key is required."""
    if default is None:
        scaling.require("factor", f"rope_type {kind}")
        default = 0.0  # where it is null; the check refuses it
    value = scaling.number("factor", default, LEAST_FACTOR, MOST_FACTOR)
    if not value >= LEAST_FACTOR or not math.isfinite(value * length):
        raise scaling.wrong("factor", scaling.get("factor"), "a number above 0 that makes a finite length")
    return value


def _divisors(scaling: ConfigReader, name: str, dim: int) -> tuple[float, ...]:
    """The divisors of the frequencies, [dim / 2]."""
    values = scaling.get(name)
    if (
        not isinstance(values, list)
        or len(values) != dim // 2
        or not all(
            isinstance(value, (int, float)) and LEAST_FACTOR <= value <= MOST_FACTOR for value in values
        )
    ):
        allowed = f"a list of {dim // 2} numbers from {LEAST_FACTOR:g} to {MOST_FACTOR:g}"
        raise scaling.wrong(name, values, allowed)
    return tuple(float(value) for value in values)
