"""attend(): the only softmax of the project, and the choice of the kernel that computes it."""

from __future__ import annotations

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
    # Measured on a CPU: one query reads the cache at memory speed by two matmuls, 4 to 5 times faster in
    # bfloat16 than by the fused kernel, and a little faster in float32. Many queries go in tiles, each beside
    # the keys of its band: for 512 of them and W = 1024, half the time of one matmul with all keys, in
    # float32 1.2 times the time of fused tiles, in bfloat16 0.7 times. Sinks seen from another place need
    # scores of two kinds, which the fused kernel has not.
    apart = step.sinks > 0 and near is not far
    on_cpu, queries = near.device.type == "cpu", near.shape[2]
    if step.band is not None and queries > 1 and (apart or (on_cpu and not step.causal)):
        return _in_tiles(near, far, keys, values, step, scale, bias)
    if apart or (on_cpu and queries == 1):
        return _by_matmul(near, far, keys, values, step, scale, bias)
    return _fused(near, keys, values, step, scale, bias)


TILE = 128  # queries; 64 and 256 are within 5 % of it, or slower


def _in_tiles(
    near: Tensor, far: Tensor, keys: Tensor, values: Tensor, step: Step, scale: float, bias: Tensor | None
) -> Tensor:
    """A few queries after the other, each few against the sinks and the run of keys that they see."""
    band = step.band
    assert band is not None
    B, H, T, D = near.shape
    G, columns = keys.shape[1], band.columns
    tile = TILE if near.device.type == "cpu" else 4 * TILE
    apart = step.sinks > 0 and near is not far
    read = torch.empty_like(near, dtype=values.dtype)
    mask, known = None, None  # the same from tile to tile, once the first are over
    for start in range(0, T, tile):
        stop = min(start + tile, T)
        low, high = band.keys(start, stop)
        rows = (B, G, H // G * (stop - start))
        scores = near[:, :, start:stop].reshape(*rows, D) @ keys[:, :, low - columns : high].transpose(2, 3)
        if columns:  # … of which the first were not meant: there the sinks stand
            sunken = (far if apart else near)[:, :, start:stop].reshape(*rows, D)
            scores[..., :columns] = sunken @ keys[:, :, :columns].transpose(2, 3)
        scores = scores.view(B, H, stop - start, -1).to(_wide(scores.dtype)).mul_(scale)
        if bias is not None:
            part = bias[:, :, start:stop]
            scores = scores + torch.cat((part[..., :columns], part[..., low:high]), -1)
        kind = (stop - start, high - low, band.start + start - band.first - low, band.start + start < columns)
        if kind != known or kind[-1]:
            mask, known = band.mask(start, stop, near.device), kind
            mask = None if mask is None else ~mask
        if mask is not None:
            scores = scores.masked_fill_(mask, -torch.inf)
        weights = scores.softmax(-1).to(values.dtype).view(*rows, -1)
        part = weights[..., columns:] @ values[:, :, low:high]
        if columns:
            part = part + weights[..., :columns] @ values[:, :, :columns]
        read[:, :, start:stop] = part.view(B, H, stop - start, D)
    return read


def _by_matmul(
    near: Tensor, far: Tensor, keys: Tensor, values: Tensor, step: Step, scale: float, bias: Tensor | None
) -> Tensor:
    B, H, T, D = near.shape
    G, K = keys.shape[1], keys.shape[2]
    grouped = (B, G, H // G * T, D)  # the queries that share a key head are rows of one matmul
    scores = near.reshape(grouped) @ keys.transpose(2, 3)  # [B, G, H/G·T, K]
    if step.sinks and near is not far:
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
