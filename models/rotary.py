"""Rotary position embedding: explicit places in, rotated queries and keys out, no state.

Su et al., RoFormer (arXiv 2104.09864), in the half-split layout of Hugging Face checkpoints: dimension i rotates
with dimension i + dim/2. The variants for longer texts are named after their `rope_type` in config.json.
Frequencies are float32 values, as in training. Angles are exact for any place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from streamllm.models.step import Step


@dataclass(frozen=True)
class Rope:
    """The plain frequencies, 1 / theta^(2i/dim), and what its variants share.

    `dim` is the number of leading dimensions of a head that rotate; an odd one rotates dim + 1.
    """

    theta: float
    dim: int
    attention_factor: float = 1.0  # cosine and sine are multiplied by it, scores by its square
    float32_angles: bool = False  # as transformers rounds them, for parity runs: off by 1e-4 at 4,000 tokens

    def frequencies(self, rope_length: int) -> Tensor:
        """Angles per place: float32 [ceil(dim/2)]. `rope_length` is T without a cache, S + W with one."""
        return 1.0 / self._powers()

    def trained_length(self, positions: int) -> int:
        """The trained length in tokens, where the config's max_position_embeddings is `positions`."""
        return positions

    def _powers(self, theta: float | Tensor | None = None) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device="cpu") / self.dim
        return (self.theta if theta is None else theta) ** exponents


@dataclass(frozen=True)
class LinearRope(Rope):
    """Position interpolation (arXiv 2306.15595): every frequency slowed by `factor`."""

    factor: float = 1.0

    def frequencies(self, rope_length: int) -> Tensor:
        return 1.0 / self._powers() / self.factor

    def trained_length(self, positions: int) -> int:
        return int(positions * self.factor)


@dataclass(frozen=True)
class DynamicRope(Rope):
    """NTK-aware interpolation: theta grows with the length, once that exceeds `positions`."""

    factor: float = 1.0
    positions: int = 2048

    def frequencies(self, rope_length: int) -> Tensor:
        if rope_length <= self.positions:
            return 1.0 / self._powers()
        length = torch.tensor(rope_length, dtype=torch.float32, device="cpu")
        stretch = self.factor * length / self.positions - (self.factor - 1)
        return 1.0 / self._powers(self.theta * stretch ** (self.dim / (self.dim - 2)))

    def trained_length(self, positions: int) -> int:
        return int(positions * self.factor)


@dataclass(frozen=True)
class Llama3Rope(Rope):
    """Llama 3.1 (arXiv 2407.21783): long wavelengths slowed by `factor`, short ones kept, a ramp between."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original: int = 8192

    def frequencies(self, rope_length: int) -> Tensor:
        plain = 1.0 / self._powers()
        wavelength = 2 * math.pi / plain
        ramp = (self.original / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        between = (1 - ramp) * plain / self.factor + ramp * plain
        slow = wavelength > self.original / self.low_freq_factor
        fast = wavelength < self.original / self.high_freq_factor
        return torch.where(slow, plain / self.factor, torch.where(fast, plain, between))


@dataclass(frozen=True)
class YarnRope(Rope):
    """YaRN (arXiv 2309.00071): interpolation by parts, between `beta_fast` and `beta_slow` turns."""

    factor: float = 1.0
    original: int = 2048
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def frequencies(self, rope_length: int) -> Tensor:
        def dimension(
            turns: float,
        ) -> float:  # the dimension that rotates `turns` times in the original length
            return self.dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001
        places = torch.arange(self.dim // 2, dtype=torch.float32, device="cpu")
        kept = 1 - ((places - low) / (high - low)).clamp(0, 1)
        powers = self._powers()
        return 1.0 / (self.factor * powers) * (1 - kept) + 1.0 / powers * kept

    def trained_length(self, positions: int) -> int:
        return max(positions, int(self.factor * self.original))


@dataclass(frozen=True)
class LongRope(Rope):
    """LongRoPE (arXiv 2402.13753): one list of divisors for lengths up to `original`, one for longer ones."""

    factor: float = 1.0
    original: int = 4096
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def frequencies(self, rope_length: int) -> Tensor:
        divisors = self.long_factor if rope_length > self.original else self.short_factor
        return 1.0 / (torch.tensor(divisors, dtype=torch.float32, device="cpu") * self._powers())

    def trained_length(self, positions: int) -> int:
        return max(positions, int(self.factor * self.original))


Table = tuple[Tensor, Tensor]  # cosines and signed sines, in the model's type: [R, 1, T, dim] each


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotations of one Step: a table for each kind of place in it."""

    query: Table  # at query_place
    sink_query: Table | None  # at sink_query_place; None where the sinks meet the same query
    new_key: Table  # at new_key_place

    def queries(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries [B, H, T, D] as recent keys meet them, and as the sinks do (None: the same)."""
        return _rotate(q, self.query), None if self.sink_query is None else _rotate(q, self.sink_query)

    def keys(self, k: Tensor) -> Tensor:
        """New keys [B, G, T, D], rotated once to the place where they stay."""
        return _rotate(k, self.new_key)


def rotation(rope: Rope, step: Step, dtype: torch.dtype) -> Rotation:
    """The rotation of one Step's queries and keys, for all layers that share it."""
    if not step.sinks:  # then both places of a query agree, and its key is rotated there, too
        table = _table(rope, step.query_place, step.rope_length, dtype)
        return Rotation(table, None, table)
    places = torch.stack((step.query_place, step.sink_query_place, step.new_key_place))
    cos, sin = _table(rope, places, step.rope_length, dtype)
    return Rotation((cos[0], sin[0]), (cos[1], sin[1]), (cos[2], sin[2]))


def moved_keys(rope: Rope, keys: Tensor, shift: int, rope_length: int) -> Tensor:
    """Rotated keys [..., D], rotated on as if each stood `shift` places further on. Rounded once, to their type."""
    wide = keys.float() if keys.device.type == "mps" else keys.double()
    turn = replace(rope, attention_factor=1.0, float32_angles=False)  # the keys have their factor
    table = _table(
        turn, torch.tensor([shift], device=keys.device, dtype=torch.int64), rope_length, wide.dtype
    )
    return _rotate(wide, table).to(keys.dtype)


def _table(rope: Rope, places: Tensor, rope_length: int, dtype: torch.dtype) -> Table:
    """places int64 [..., T] -> cosine and signed sine [..., 1, T, dim], in `dtype`."""
    device = places.device
    if device.type == "mps":  # it has no float64
        places = places.cpu()
    # While torch.export or torch.compile traces a model, nothing is kept: its tensors have no values.
    frequencies = _frequencies.__wrapped__ if torch.compiler.is_compiling() else _frequencies
    inverse = frequencies(rope, rope_length, places.device)
    if rope.float32_angles:
        angles = places.float()[..., None] * inverse.float()
        cos, sin = angles.cos(), angles.sin()
    else:
        # The float64 product of a place and a float32 frequency is exact only below 2^29. So split the place
        # into a multiple of 2^20 and a rest, and join the two angles by the addition theorem.
        angles = torch.stack((places >> 20 << 20, places & 0xFFFFF))[..., None] * inverse
        coarse, fine = angles.cos()
        coarse_sin, fine_sin = angles.sin()
        cos = coarse * fine - coarse_sin * fine_sin
        sin = coarse_sin * fine + coarse * fine_sin
    if rope.attention_factor != 1.0:
        cos, sin = cos * rope.attention_factor, sin * rope.attention_factor
    cos = torch.cat((cos, cos), -1).unsqueeze(-3)
    sin = torch.cat((-sin, sin), -1).unsqueeze(-3)
    return cos.to(device, dtype), sin.to(device, dtype)


@lru_cache(64)
def _frequencies(rope: Rope, rope_length: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or autograd could not use it
        return rope.frequencies(rope_length).to(device, torch.float64)


def _rotate(x: Tensor, table: Table) -> Tensor:
    """x [B, H, T, D]; the first `dim` of its D dimensions rotate, the others stay."""
    cos, sin = table
    dim = cos.shape[-1]
    if dim == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(dim // 2, -1), sin)
    rotating = x[..., :dim]
    return torch.cat((torch.addcmul(rotating * cos, rotating.roll(dim // 2, -1), sin), x[..., dim:]), -1)
