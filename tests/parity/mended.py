"""transformers without the faults that `match_transformers` reproduces."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor


def _float32_alibi(attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """Falcon's ALiBi in float32, where transformers rounds to bfloat16: [B·H, 1, T]."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    assert attention_mask.all()
    rows, length = attention_mask.shape
    bias = torch.tensor(slopes)[:, None] * torch.arange(length)
    return bias.repeat(rows, 1)[:, None].to(dtype)


@contextmanager
def mended() -> Iterator[None]:
    """Inside this context, Falcon's ALiBi is in float32, and MPT's uses the alibi_bias_max of its config."""
    from transformers.models.falcon import modeling_falcon
    from transformers.models.mpt import modeling_mpt

    def alibi_of_config(self, num_heads: int, length: int, alibi_bias_max: int = 8, device=None) -> Tensor:
        largest = self.config.attn_config.alibi_bias_max
        return modeling_mpt.build_mpt_alibi_tensor(num_heads, length, largest, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_falcon, "build_alibi_tensor", _float32_alibi)
        patch.setattr(modeling_mpt.MptModel, "build_mpt_alibi_tensor", alibi_of_config)
        yield
