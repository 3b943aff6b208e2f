"""rope_theta, rope_scaling and rope_parameters of config.json, old and new, -> Rope."""

from __future__ import annotations

import math
import sys

from streamllm.models import rotary
from streamllm.weights.config_reader import ConfigReader

TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def read_rope(
    config: ConfigReader, dim: int, theta: float, positions: int, match_transformers: bool
) -> rotary.Rope:
    """The rotary frequencies that a config asks for.

    A rope_scaling that is not empty replaces rope_parameters. In it, rope_type wins over type. Its keys win
    over the same keys of the config itself, except for original_max_position_embeddings.

    Args:
        dim: how many of a head's dimensions are rotated.
        theta: the config's own rope_theta, outside rope_scaling.
        positions: max_position_embeddings.
        match_transformers: multiply place and frequency in float32, as transformers does.
    """
    new_spelling = config.inner("rope_parameters")
    scaling = config.inner("rope_scaling") or new_spelling or ConfigReader({}, "rope_scaling")
    kind = scaling.choice("rope_type", scaling.choice("type", "default", TYPES), TYPES)
    theta = scaling.number("rope_theta", theta)
    if theta <= 0:
        raise scaling.wrong("rope_theta", theta, "a number above 0")
    plain = rotary.Rope(theta, dim, float32_angles=match_transformers)

    if kind == "default":
        return plain
    if kind == "linear":
        return rotary.LinearRope(theta, dim, float32_angles=match_transformers, factor=_factor(scaling))
    if kind == "dynamic":
        if dim <= 2:
            raise config.wrong("head dimension", dim, "more than 2 rotary dimensions with dynamic scaling")
        return rotary.DynamicRope(
            theta, dim, float32_angles=match_transformers, factor=_factor(scaling), positions=positions
        )

    if kind in ("yarn", "longrope") and dim % 2:
        raise scaling.wrong(
            "rope_type", kind, f"other types, because {dim} dimensions, an odd number, rotate"
        )
    original = scaling.size("original_max_position_embeddings", positions)
    original = config.size("original_max_position_embeddings", original)
    if kind == "llama3":
        return _llama3(scaling, plain, original)
    factor = _factor(scaling, positions / original)
    if kind == "yarn":
        return _yarn(scaling, plain, factor, original)
    return _longrope(scaling, plain, factor, original)


def _llama3(scaling: ConfigReader, plain: rotary.Rope, original: int) -> rotary.Rope:
    low, high = scaling.number("low_freq_factor", 1.0), scaling.number("high_freq_factor", 4.0)
    if not 0 < low < high:
        raise scaling.wrong("high_freq_factor", high, f"a number above low_freq_factor, {low}, above 0")
    return rotary.Llama3Rope(
        plain.theta,
        plain.dim,
        float32_angles=plain.float32_angles,
        factor=_factor(scaling),
        low_freq_factor=low,
        high_freq_factor=high,
        original=original,
    )


def _yarn(scaling: ConfigReader, plain: rotary.Rope, factor: float, original: int) -> rotary.Rope:
    mscale, mscale_all_dim = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
    if mscale and mscale_all_dim:
        attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
    else:
        attention_factor = _yarn_mscale(factor, 1.0)
    fast = scaling.number("beta_fast", 32.0) or 32.0
    slow = scaling.number("beta_slow", 1.0) or 1.0
    if not 0 < slow < fast:
        raise scaling.wrong("beta_fast", fast, f"a number above beta_slow, {slow}, above 0")
    if plain.theta == 1:
        raise scaling.wrong("rope_theta", plain.theta, "a number other than 1 with yarn")
    return rotary.YarnRope(
        plain.theta,
        plain.dim,
        attention_factor=scaling.number("attention_factor", attention_factor, 0.0),
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
        attention_factor=scaling.number("attention_factor", attention_factor, 0.0),
        float32_angles=plain.float32_angles,
        factor=factor,
        original=original,
        short_factor=_divisors(scaling, "short_factor", plain.dim),
        long_factor=_divisors(scaling, "long_factor", plain.dim),
    )


def _factor(scaling: ConfigReader, default: float | None = None) -> float:
    value = scaling.number("factor", 0.0 if default is None else default)
    if value <= 0:
        raise scaling.wrong("factor", scaling.get("factor"), "a number above 0")
    return value


def _divisors(scaling: ConfigReader, name: str, dim: int) -> tuple[float, ...]:
    """The divisors of the frequencies, [dim / 2]."""
    values = scaling.get(name)
    if (
        not isinstance(values, list)
        or len(values) != dim // 2
        or not all(isinstance(value, (int, float)) and 0 < value <= sys.float_info.max for value in values)
    ):
        raise scaling.wrong(name, values, f"a list of {dim // 2} numbers above 0")
    return tuple(float(value) for value in values)
