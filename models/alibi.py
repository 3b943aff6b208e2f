"""ALiBi: a bias on the scores that falls with distance. Explicit places in, no state.

Press et al., Train Short, Test Long (arXiv 2108.12409): head h lowers the score of a key by slope_h for each
token of distance from the query. Nothing is rotated; a key is cached as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from streamllm.models.step import Step


@dataclass(frozen=True)
class Alibi:
    """Slopes from 2^(-bias_max / n) down to 2^(-bias_max), where n is the number of heads."""

    heads: int  # H
    bias_max: float = 8.0
    bfloat16_ranks: bool = (
        False  # as transformers rounds in Falcon, for parity runs: off by 0.5 at 600 tokens
    )

    def slopes(self) -> Tensor:
        """float32 [H]. For 12 heads: those of 8, then every other one of 16, as the models were trained."""
        even = 1 << self.heads.bit_length() - 1  # the power of two at or below H
        eighths = [(i + 1) / even for i in range(even)]
        between = [(i + 0.5) / even for i in range(self.heads - even)]
        slopes = [2.0 ** (-self.bias_max * part) for part in eighths + between]
        return torch.tensor(slopes, dtype=torch.float32, device="cpu")


def position_bias(alibi: Alibi, step: Step, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """The bias of one Step's scores, times `scale`: [R, H, T, K] in float32; in float64 where `dtype` is.

    dtype: the model's.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # As in rotary.py, nothing is kept while a model is traced.
    kept_slopes = _slopes.__wrapped__ if torch.compiler.is_compiling() else _slopes
    slopes = kept_slopes(alibi, step.query_place.device)[:, None, None]  # [H, 1, 1]
    distance = step.distance()[:, None]  # [R, 1, T, K]
    if not alibi.bfloat16_ranks:
        return distance.to(wide) * (slopes.to(wide) * -scale)
    ranks = step.sink_query_place[:, None, :, None] - distance  # of a key among those that the query sees
    return ((slopes.bfloat16() * ranks.bfloat16()).to(dtype) * scale).to(wide)


@lru_cache(64)
def _slopes(alibi: Alibi, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or autograd could not use it
        return alibi.slopes().to(device)
