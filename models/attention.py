"""attend(): the only softmax of the project, and the choice of the kernel that computes it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from streamllm.models.step import Step


def attend(
    near: Tensor,
    far: Tensor,
    keys: Tensor,
    values: Tensor,
    step: Step,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """What each query reads: softmax(scale · q·k + bias over the visible keys) · values.

    near, far [B, H, T, D]: the queries as recent keys and as sinks see them (the same tensor without
    rotation, or where step.sinks is 0). keys, values [B, G, K, D] with G dividing H: query heads
    j·H/G … share key head j, which is never copied. bias [R, H, T, K] in float32 or wider, added after
    scaling. Returns [B, H, T, D] in the type of the values. The softmax runs in float32 for half types.
    """
    # One query on a CPU reads the cache at memory speed by two matmuls, 4 to 5 times faster in bfloat16
    # than by the fused kernel. Sinks seen from another place need scores of two kinds, which it has not.
    if step.sinks and near is not far:
        return _by_matmul(near, far, keys, values, step, scale, bias)
    # A bias in a half type goes with scores that are rounded to it: the fused kernel does not round them, and
    # is then as far from a model that ran elsewhere as two separate roundings are (1.02 of what is allowed,
    # 0.89 to 0.97 so).
    biased_half = bias is not None and near.dtype != _wide(near.dtype)
    if near.device.type == "cpu" and (near.shape[2] == 1 or biased_half):
        return _by_matmul(near, far, keys, values, step, scale, bias)
    return _fused(near, keys, values, step, scale, bias)


def _by_matmul(
    near: Tensor, far: Tensor, keys: Tensor, values: Tensor, step: Step, scale: float, bias: Tensor | None
) -> Tensor:
    B, H, T, D = near.shape
    G, K = keys.shape[1], keys.shape[2]
    apart = step.sinks > 0 and near is not far
    if near.dtype == torch.float16:  # q·k can pass its end at 65,504; a power of two rounds nothing
        power = 2.0 ** min(0, math.frexp(scale)[1])
        near, far, scale = near * power, far * power, scale / power
    grouped = (B, G, H // G * T, D)  # the queries that share a key head are rows of one matmul
    scores = near.reshape(grouped) @ keys.transpose(2, 3)  # [B, G, H/G·T, K]
    if apart:
        scores[..., : step.sinks] = far.reshape(grouped) @ keys[:, :, : step.sinks].transpose(2, 3)
    scores = scores.view(B, H, T, K).to(_wide(scores.dtype)).mul_(scale)
    if bias is not None:
        scores = scores + bias
    mask = step.mask()
    if mask is not None:
        scores = scores.masked_fill_(~mask[:, None], -torch.inf)
    weights = scores.softmax(-1).to(values.dtype)
    return (weights.view(B, G, H // G * T, K) @ values).view(B, H, T, D)


def _fused(q: Tensor, keys: Tensor, values: Tensor, step: Step, scale: float, bias: Tensor | None) -> Tensor:
    known = step.causal and bias is None
    mask = None if known else step.mask()
    if mask is not None:
        mask = mask[:, None]
    if bias is not None:
        mask = (bias if mask is None else bias.masked_fill(~mask, -torch.inf)).to(q.dtype)
    return F.scaled_dot_product_attention(
        q,
        keys,
        values,
        attn_mask=mask,
        is_causal=known,
        scale=scale,
        enable_gqa=q.shape[1] != keys.shape[1],
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
