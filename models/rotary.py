"""Rotary position embedding: explicit places in, rotated queries and keys out, nothing remembered.

Su et al., RoFormer (arXiv 2104.09864), in the half-split layout of Hugging Face checkpoints: dimension i
turns with dimension i + dim/2. The stretched variants are named after their `rope_type` in config.json.
Frequencies are float32 values, as the checkpoints were trained with; angles are exact for any place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from streamllm.models.step import Step


@dataclass(frozen=True)
class Rope:
    """The plain frequencies, 1 / theta^(2i/dim), and what its variants share.

    `dim` is how many leading dimensions of a head turn; an odd one turns dim + 1.
    """

    theta: float
    dim: int
    attention_factor: float = 1.0  # cosine and sine are multiplied by it, scores by its square
    float32_angles: bool = (
        False  # transformers' rounding, wrong by 1e-4 at 4,000 tokens: for parity runs only
    )

    def frequencies(self, span: int) -> Tensor:
        """Angles per place: float32 [ceil(dim/2)]. `span` is the length of the text, S + W with a cache."""
        return 1.0 / self._powers()

    def trained_length(self, positions: int) -> int:
        """How long a text may be, when the config's max_position_embeddings says `positions`."""
        return positions

    def _powers(self, theta: float | Tensor | None = None) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, device="cpu").float() / self.dim
        return (self.theta if theta is None else theta) ** exponents


@dataclass(frozen=True)
class LinearRope(Rope):
    """Position interpolation (arXiv 2306.15595): every frequency slowed by `factor`."""

    factor: float = 1.0

    def frequencies(self, span: int) -> Tensor:
        return 1.0 / self._powers() / self.factor

    def trained_length(self, positions: int) -> int:
        return int(positions * self.factor)


@dataclass(frozen=True)
class DynamicRope(Rope):
    """NTK-aware interpolation whose theta grows with the span, once that exceeds `positions`."""

    factor: float = 1.0
    positions: int = 2048

    def frequencies(self, span: int) -> Tensor:
        if span <= self.positions:
            return 1.0 / self._powers()
        stretch = self.factor * torch.tensor(span, device="cpu") / self.positions - (self.factor - 1)
        return 1.0 / self._powers(self.theta * stretch ** (self.dim / (self.dim - 2)))

    def trained_length(self, positions: int) -> int:
        return int(positions * self.factor)


@dataclass(frozen=True)
class Llama3Rope(Rope):
    """Llama 3.1: long wavelengths slowed by `factor`, short ones kept, a ramp between."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original: int = 8192

    def frequencies(self, span: int) -> Tensor:
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

    def frequencies(self, span: int) -> Tensor:
        def dimension(turns: float) -> float:  # whose wave turns so often within the original length
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
    """LongRoPE (arXiv 2402.13753): one list of divisors for spans up to `original`, one for longer ones."""

    factor: float = 1.0
    original: int = 4096
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def frequencies(self, span: int) -> Tensor:
        divisors = self.long_factor if span > self.original else self.short_factor
        return 1.0 / (torch.tensor(divisors, dtype=torch.float32, device="cpu") * self._powers())

    def trained_length(self, positions: int) -> int:
        return max(positions, int(self.factor * self.original))


@dataclass(frozen=True, eq=False)
class Rotation:
    """Cosines and sines of one Step, rounded to the model's type: [R, 1, T, dim] each."""

    near: tuple[Tensor, Tensor]
    far: tuple[Tensor, Tensor] | None  # None: as near
    own: tuple[Tensor, Tensor]

    def queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, H, T, D], turned to where recent keys and to where sinks see them."""
        near = _turn(q, *self.near)
        return near, near if self.far is None else _turn(q, *self.far)

    def keys(self, k: Tensor) -> Tensor:
        """Keys [B, G, T, D], turned to the place where they stay for ever."""
        return _turn(k, *self.own)


def rotation(rope: Rope, step: Step, dtype: torch.dtype) -> Rotation:
    """The rotation of one Step's queries and keys, for all layers that share it."""
    if not step.sinks:  # near and far agree, and the keys stand where their queries do
        cos, sin = _tables(rope, step.near, step.span, dtype)
        return Rotation((cos, sin), None, (cos, sin))
    cos, sin = _tables(rope, torch.stack((step.near, step.far, step.own)), step.span, dtype)
    return Rotation((cos[0], sin[0]), (cos[1], sin[1]), (cos[2], sin[2]))


def _tables(rope: Rope, places: Tensor, span: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """places int64 [..., T] -> cosine and signed sine [..., 1, T, dim], in `dtype`."""
    home = places.device
    if home.type == "mps":  # it has no float64
        places = places.cpu()
    inverse = _frequencies(rope, span, places.device)
    if rope.float32_angles:
        angles = places.float()[..., None] * inverse.float()
        cos, sin = angles.cos(), angles.sin()
    else:
        # A float64 product of place and frequency is exact only below 2^29: split the place, and join the
        # two angles by the addition theorem.
        angles = torch.stack((places >> 20 << 20, places & 0xFFFFF))[..., None] * inverse
        coarse, fine = angles.cos()
        coarse_sin, fine_sin = angles.sin()
        cos = coarse * fine - coarse_sin * fine_sin
        sin = coarse_sin * fine + coarse * fine_sin
    if rope.attention_factor != 1.0:
        cos, sin = cos * rope.attention_factor, sin * rope.attention_factor
    cos = torch.cat((cos, cos), -1).unsqueeze(-3)
    sin = torch.cat((-sin, sin), -1).unsqueeze(-3)
    return cos.to(home, dtype), sin.to(home, dtype)


@lru_cache(maxsize=64)
def _frequencies(rope: Rope, span: int, device: torch.device) -> Tensor:
    return rope.frequencies(span).to(device, torch.float64)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, D]; the first `dim` of its D dimensions turn, the others pass."""
    dim = cos.shape[-1]
    if dim == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(dim // 2, -1), sin)
    turning = x[..., :dim]
    return torch.cat((torch.addcmul(turning * cos, turning.roll(dim // 2, -1), sin), x[..., dim:]), -1)
