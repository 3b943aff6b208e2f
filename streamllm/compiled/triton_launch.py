"""The Triton kernels as functions of tensors: output, grid and tile of each launch. For recordings of one token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streamllm.compiled import triton_attention_kernel, triton_int4_kernels, triton_tiles
from streamllm.compiled import triton_kernels as kernels

FUSED_ADDS: dict[str, Any] = {"enable_fp_fusion": True}  # the default until Triton 3.9
# Norm of a product's input: kind, weight [K], bias [K] or None, eps.
Norm = tuple[int, Tensor, "Tensor | None", float]
# The second product of a gated one: weight [N, K], scale [N] or None, bias [N] or None.
Up = tuple[Tensor, "Tensor | None", "Tensor | None"]


JOINED = 8192  # float32 numbers of the splits that attention joins at a time


def _early(x: Tensor, width: int) -> dict[str, Any]:
    """The options of every launch: on a Hopper GPU or later, a kernel starts before the previous one has ended.

    In narrow models, whose kernels last a few microseconds, the next one starts even earlier.
    """
    early = 0
    if triton_tiles.starts_early(x.device):
        early = triton_tiles.FROM_THE_START if width <= triton_tiles.NARROW else triton_tiles.AT_THE_END
    return {**FUSED_ADDS, "EARLY": early, "launch_pdl": early > 0}


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()


def product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    up: Up | None = None,
    residual: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    """residual + activation(norm(x) @ weight.T + bias) · (norm(x) @ up.T + its bias): x [B, 1, K] -> [B, 1, N].

    weight [N, K], in the type of x, or int8 with a `scale` [N]; int4 as in triton_int4_kernels.py.
    """
    x = x.contiguous()
    rows, outputs, inputs = x.numel() // x.shape[-1], len(weight), x.shape[-1]
    if rows > 1 and norm is not None:
        x, norm = normalised(x, *norm), None
    out = x.new_empty(*x.shape[:-1], outputs)
    up_weight, up_scale, up_bias = (weight, scale, bias) if up is None else up
    tile = triton_tiles.tile_of(rows, weight, up is not None)
    launch_product(tile, x, weight, scale, bias, norm, (up_weight, up_scale, up_bias), up is not None,
                   residual, activation, out, rows, outputs, inputs)  # fmt: skip
    return out


def launch_product(
    tile: triton_tiles.Tile,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    norm: Norm | None,
    up: Up,
    gated: bool,
    residual: Tensor | None,
    activation: int,
    out: Tensor,
    rows: int,
    outputs: int,
    inputs: int,
) -> None:
    """One launch with the given tile; see `product`."""
    kind, norm_weight, norm_bias, eps = (kernels.NO_NORM, x, None, 0.0) if norm is None else norm
    BN, BK = tile.outputs, tile.inputs
    shared = dict(
        K=inputs, ACTIVATION=activation, GATED=gated, BIAS=bias is not None, RESIDUAL=residual is not None,
        BN=BN, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    module: Any = kernels
    if scale is not None and scale.dim() == 2:  # int4: BK counts bytes of a row
        module, group = triton_int4_kernels, inputs // scale.shape[1]
        shared |= {
            "GROUP": group,
            **({"BG": max(1, 2 * BK // group)} if rows == 1 else {"BK": BK}),
            **FUSED_ADDS,
        }
    else:
        shared |= {"INT8": scale is not None, "BK": BK, "PTX": triton_tiles.on_gpu(x.device)}
        shared |= _early(x, min(inputs, outputs))
        if rows == 1:
            shared |= {"AHEAD": tile.ahead, "FOLD": tile.fold}
    second = up[0], _or(up[1], x), _or(up[2], x)
    blocks = -(-outputs // BN)
    if rows == 1:
        module.matvec[(blocks,)](
            x, norm_weight, _or(norm_bias, x), weight, _or(scale, x), _or(bias, x), *second, _or(residual, x), out,
            outputs, eps, K_PADDED=power_of_two(inputs), EVEN_N=outputs % BN == 0, NORM=kind,
            NORM_BIAS=norm_bias is not None, **shared,
        )  # fmt: skip
        return
    module.matmul_rows[(blocks, -(-rows // tile.rows))](
        x,
        weight,
        _or(scale, x),
        _or(bias, x),
        *second,
        _or(residual, x),
        out,
        rows,
        outputs,
        BM=tile.rows,
        **shared,
    )


def normalised(x: Tensor, kind: int, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The norm of each row of x [..., K]."""
    return _normalised(x.contiguous(), None, kind, weight, bias, eps)[1]


def added_and_normalised(
    x: Tensor, added: Tensor, kind: int, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x + added, and its norm."""
    return _normalised(x.contiguous(), added.contiguous(), kind, weight, bias, eps)


def _normalised(
    x: Tensor, added: Tensor | None, kind: int, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    inputs = x.shape[-1]
    out = torch.empty_like(x)
    total = x if added is None else torch.empty_like(x)
    kernels.norm_rows[(x.numel() // inputs,)](
        x, _or(added, x), weight, _or(bias, x), total, out, eps, K=inputs, K_PADDED=power_of_two(inputs), NORM=kind,
        BIAS=bias is not None, ADDED=added is not None, num_warps=4 if inputs <= 4096 else 8, **_early(x, inputs),
    )  # fmt: skip
    return total, out


def gated(x: Tensor, up: Tensor, activation: int) -> Tensor:
    """activation(x) · up for [B, T, N], each perhaps a part of a wider product."""
    rows, outputs = x.numel() // x.shape[-1], x.shape[-1]
    out = x.new_empty(x.shape)
    x, up = _rows(x), _rows(up)
    block = 1024
    kernels.gate_rows[(rows, -(-outputs // block))](
        x,
        up,
        out,
        x.stride(0),
        up.stride(0),
        outputs,
        ACTIVATION=activation,
        BLOCK=block,
        num_warps=4,
        **_early(x, outputs),
    )
    return out


def rope_tables(
    places: Tensor, origin: Tensor, starts: Tensor, frequencies: Tensor, factor: float, sinks: int, slots: int
) -> tuple[Tensor, ...]:
    """float32 [R, dim] each: cosines and sines of the query, of the query for sinks, and of the new key.

    With sinks=0 all are at one place, and the tables are the same tensors. frequencies float64 [dim / 2].
    """
    kinds, half, rows = 3 if sinks else 1, len(frequencies), len(places)
    out = torch.empty(kinds, 2, rows, 2 * half, dtype=torch.float32, device=places.device)
    kernels.rope_tables[(kinds, rows)](
        places, origin, starts, frequencies, out, factor, HALF=half, HALF_PADDED=power_of_two(half), SINKS=sinks,
        SLOTS=slots, num_warps=1, **_early(places, triton_tiles.NARROW + 1),
    )  # fmt: skip
    return tuple(out[kind if sinks else 0, part] for kind in range(3) for part in range(2))


def attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring: Sequence[Tensor],
    places: Tensor,
    starts: Tensor,
    arrived: Tensor,
    tables: Sequence[Tensor],
    head_norms: tuple[Tensor, Tensor, float, float] | None,
    alibi: tuple[Tensor, float] | None,
    dim: int,
    sinks: int,
    scale: float,
    clip: float | None,
    tile: Sequence[int],
) -> Tensor:
    """q [B, 1, H · D], k and v [B, 1, G · D] as they were projected -> [B, 1, H · D], with the new token stored.

    ring: keys and values [B, G, S + W, D]; or the sinks, scales and numbers of an int8 ring. places int64 [R].
    starts int64 [B]: the first place after the sinks. arrived int32 [B · G], all 0. tables: six of
    `rope_tables`, or none. head_norms: weights [D] of q and k, and their eps. alibi: slopes float32 [H], and what
    they are multiplied by. tile: an AttentionTile.
    """
    splits, block, warps, stages = tile
    q, k, v = _rows(q), _rows(k), _rows(v)
    if len(ring) == 2:
        keys, values = ring
        key_sinks, value_sinks, key_scales, value_scales, slots = *ring, *ring, keys.shape[2]
    else:
        (key_sinks, value_sinks), (key_scales, value_scales), (keys, values) = ring
        slots = key_sinks.shape[2] + keys.shape[2]
    batch, heads = keys.shape[:2]
    shared = q.shape[1] // (heads * dim)
    out = q.new_empty(batch, 1, q.shape[1])
    dim_padded = max(16, power_of_two(dim))
    shared_padded = 1 if shared == 1 else max(16, power_of_two(shared))  # matrix units need 16 rows
    partial, log_sums = out, out
    if splits > 1:
        sums = batch * heads * splits * shared
        partial = torch.empty(sums * dim_padded, dtype=torch.float32, device=q.device)
        log_sums = torch.empty(sums, dtype=torch.float32, device=q.device)
    joined_heads = power_of_two(shared)
    joined_splits = max(1, min(power_of_two(splits), JOINED // (joined_heads * dim_padded)))
    sink_block = block if shared == 1 else min(block, max(16, power_of_two(sinks)))
    early = _early(q, q.shape[1])
    if early["launch_pdl"] and batch * heads * splits < 2 * triton_tiles.multiprocessors(q.device):
        # Few programs that start early crowd the multiprocessors that become free first: with some tiles, a token of 8B
        # then took 4.6 ms instead of 4.1 (tools/gpu_check.py --parts decode-8b, H200, 2026-11).
        early["launch_pdl"] = False
    q_norm, k_norm, q_eps, k_eps = (q, k, 0.0, 0.0) if head_norms is None else head_norms
    slopes, bias_scale = (q, 0.0) if alibi is None else alibi
    triton_attention_kernel.attention[(batch * heads, splits)](
        q, k, v, keys, values, key_sinks, value_sinks, key_scales, value_scales, places, starts,
        *(tables or [q] * 6), q_norm, k_norm, slopes, out, partial, log_sums, arrived,
        scale, bias_scale, clip or 0.0, q_eps, k_eps, q.stride(0), k.stride(0), v.stride(0), int(len(places) > 1),
        *keys.stride(), *values.stride(),
        SINKS=sinks, SLOTS=slots, HEADS=heads, SHARED=shared, D=dim, D_PADDED=dim_padded,
        SHARED_PADDED=shared_padded, ROTATED=tables[0].shape[-1] if tables else 0,
        HEAD_NORMS=head_norms is not None, ALIBI=alibi is not None, CLIP=clip is not None, INT8=len(ring) > 2,
        SPLITS=splits, BLOCK=block, SINK_BLOCK=sink_block, JOINED_HEADS=joined_heads, JOINED_SPLITS=joined_splits,
        PTX=triton_tiles.on_gpu(q.device), num_warps=warps, num_stages=stages, **early,
    )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    """[B, T, N] -> [B · T, N] with adjacent numbers in a row; rows may be at any stride."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _or(tensor: Tensor | None, other: Tensor) -> Any:
    """A pointer is needed even where the kernel does not read it."""
    return other if tensor is None else tensor
