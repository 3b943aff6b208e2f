"""attend(): the only softmax of the project, and the choice of the kernel that computes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from streamllm.models.cpu import INTEL
from streamllm.models.step import Band, Step


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
    # the keys of its band: for 512 of them and W = 1024, half the time of one kernel with all keys. Sinks seen
    # from another place need scores of two kinds, which the fused kernel has not: there it is told of the band
    # alone, and the sinks are joined afterwards, in 0.5 (bfloat16) to 0.9 (float32) of two matmuls' time.
    # A bias in a half type goes with scores that are rounded to it: the fused kernel does not round them, and
    # is then as far from a model that ran elsewhere as two separate roundings are (1.02 of what is allowed,
    # 0.89 to 0.97 so). It would also round the bias itself, of which distances beyond 256 need every digit.
    apart = step.sinks > 0 and near is not far
    on_cpu, queries = near.device.type == "cpu", near.shape[2]
    biased_half = bias is not None and near.dtype != _wide(near.dtype)
    if step.band is not None and queries > 1 and (apart or biased_half or (on_cpu and not step.causal)):
        return _in_tiles(near, far, keys, values, step, scale, bias)
    if apart or biased_half or (on_cpu and queries == 1):
        return _by_matmul(near, far, keys, values, step, scale, bias)
    return _fused(near, keys, values, step, scale, bias)


TILE = 64  # queries; 32 to 256 are within 10 % of it, 512 is not


def _in_tiles(
    near: Tensor, far: Tensor, keys: Tensor, values: Tensor, step: Step, scale: float, bias: Tensor | None
) -> Tensor:
    """A few queries after the other, each few against the sinks and the run of keys that they see."""
    band = step.band
    assert band is not None
    T, columns = near.shape[2], band.columns
    on_cpu = near.device.type == "cpu"
    tile = TILE if on_cpu else 8 * TILE
    if INTEL and on_cpu and near.dtype != _wide(near.dtype):
        tile = 2 * TILE  # AMX multiplies half types: 1.03 to 1.2 times as fast
    if not step.sinks:
        far = near
    sinks = keys[:, :, :columns], values[:, :, :columns]
    joinable = on_cpu and _FLASH is not None and (bias is None or near.dtype == _wide(near.dtype))
    read: list[Tensor] = []
    runs: list[tuple[Tensor, Tensor]] = []  # what the last queries read of the runs alone, and their scores
    hidden, known = None, None
    for start in range(0, T, tile):
        stop = min(start + tile, T)
        if joinable and band.start + start >= band.sinks:  # each query sees itself in the run, and all sinks
            runs.append(_run(near, keys, values, band, start, stop, scale, bias))
            continue
        low, high = band.keys(start, stop)
        kind = stop - start, high - low, start - low, band.start + start < columns
        if kind != known or kind[-1]:  # else what the tile before hid is hidden here
            mask, known = band.mask(start, stop, near.device), kind
            hidden = None if mask is None else ~mask
        recent = near[:, :, start:stop]
        sunken = recent if far is near else far[:, :, start:stop]
        added = bias if bias is None else bias[:, :, start:stop]
        if added is not None and low > columns:
            added = torch.cat((added[..., :columns], added[..., low:high]), -1)
        elif added is not None:
            added = added[..., :high]
        # As many keys before the run as there are sinks, in whose place the sinks are put.
        run = slice(low - columns, high)
        read.append(
            _attended(recent, sunken, keys[:, :, run], values[:, :, run], sinks if columns else None,
                      low > columns, scale, added, hidden)
        )  # fmt: skip
    if runs:
        out, score = (_joined(parts) for parts in zip(*runs, strict=True))
        first = T - out.shape[2]
        added = None if bias is None else bias[:, :, first:, :columns]
        read.append(_beside_sinks(out, score, far[:, :, first:], sinks, scale, added) if columns else out)
    return _joined(read)


def _run(
    near: Tensor, keys: Tensor, values: Tensor, band: Band, start: int, stop: int, scale: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the queries `start` … `stop` - 1 read of their run of keys alone [B, H, n, D], and its score [B, H, n]."""
    assert _FLASH is not None
    low, high = band.keys(start, stop)
    behind = band.start + start - (band.first + low - band.columns)  # the first key, behind the first query
    mask = _shut(stop - start, behind, band.window, near.dtype, near.device)
    if bias is not None:
        added = bias[:, :, start:stop, low:high]
        mask = added if mask is None else added + mask
    return _FLASH(
        near[:, :, start:stop], keys[:, :, low:high], values[:, :, low:high], attn_mask=mask, scale=scale
    )


@lru_cache(maxsize=4)  # all layers, and nearly all tiles of a long text, have the same
def _shut(queries: int, behind: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A run's mask as what is added to scores: 0 or -inf [queries, keys]; None where each query sees all."""
    with torch.inference_mode(False):  # or no gradient could pass beside it
        seen = Band(behind, 0, 0, 0, window).mask(0, queries, device)
        if seen is None:
            return None
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), 2)


def _beside_sinks(
    run: Tensor, score: Tensor, far: Tensor, sinks: tuple[Tensor, Tensor], scale: float, bias: Tensor | None
) -> Tensor:
    """What was read [B, H, T, D] of a run of keys, joined with the sinks: beside them, it is like one key more.

    Its score [B, H, T] is the logarithm of what its softmax was divided by.
    """
    B, H, T, D = run.shape
    G, few, wide = sinks[0].shape[1], sinks[0].shape[2], _wide(run.dtype)
    rows = far.to(wide).reshape(B, G, H // G * T, D)
    scores = (rows @ sinks[0].to(wide).transpose(2, 3)).view(B, H, T, few).mul_(scale)
    if bias is not None:
        scores = scores + bias
    weights = torch.cat((score.to(wide)[..., None], scores), -1).softmax(-1)
    of_sinks = weights[..., 1:].reshape(B, G, H // G * T, few) @ sinks[1].to(wide)
    return torch.addcmul(of_sinks.view(B, H, T, D), run.to(wide), weights[..., :1]).to(run.dtype)


def _find_flash() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The fused kernel of the CPU, which also tells the sum: torch's own, but not one it promises to keep."""
    try:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    except AttributeError:
        return None


_FLASH = _find_flash()


def _by_matmul(
    near: Tensor, far: Tensor, keys: Tensor, values: Tensor, step: Step, scale: float, bias: Tensor | None
) -> Tensor:
    apart = step.sinks > 0 and near is not far
    sinks = (keys[:, :, : step.sinks], values[:, :, : step.sinks]) if apart else None
    mask = step.mask()
    hidden = None if mask is None else ~mask
    return _attended(near, far, keys, values, sinks, False, scale, bias, hidden)


def _attended(
    near: Tensor, far: Tensor, keys: Tensor, values: Tensor, sinks: tuple[Tensor, Tensor] | None,
    elsewhere: bool, scale: float, bias: Tensor | None, hidden: Tensor | None,
) -> Tensor:  # fmt: skip
    """The softmax itself. The first keys are those of `sinks`, which the far queries see.

    Where the sinks are `elsewhere`, other keys and values stand in their place, and do not count.
    """
    apart = near is not far
    B, H, T, D = near.shape
    G, K = keys.shape[1], keys.shape[2]
    if near.dtype == torch.float16:  # q·k can pass its end at 65,504; a power of two rounds nothing
        power = 2.0 ** min(0, math.frexp(scale)[1])
        near, far, scale = near * power, far * power, scale / power
    grouped = (B, G, H // G * T, D)  # the queries that share a key head are rows of one matmul
    near = near.reshape(grouped)
    if T == 1 and near.dtype == torch.float32 and near.device.type == "cpu" and not INTEL:
        # A matrix times a few columns reads the keys up to 1.8 times as fast as a few rows times a matrix;
        # on Intel's processors, half as fast.
        scores = (keys @ near.transpose(2, 3)).transpose(2, 3).contiguous()
    else:
        scores = near @ keys.transpose(2, 3)  # [B, G, H/G·T, K]
    columns = 0 if sinks is None else sinks[0].shape[2]
    if sinks is not None and (elsewhere or apart):
        scores[..., :columns] = far.reshape(grouped) @ sinks[0].transpose(2, 3)
    scores = scores.view(B, H, T, K).to(_wide(scores.dtype)).mul_(scale)
    if bias is not None:
        scores = scores + bias
    if hidden is not None:
        scores = scores.masked_fill_(hidden if hidden.dim() == 2 else hidden[:, None], -torch.inf)
    weights = scores.softmax(-1).to(values.dtype).view(B, G, H // G * T, K)
    if sinks is None or not elsewhere:
        return (weights @ values).view(B, H, T, D)
    read = weights[..., columns:] @ values[:, :, columns:] + weights[..., :columns] @ sinks[1]
    return read.view(B, H, T, D)


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
