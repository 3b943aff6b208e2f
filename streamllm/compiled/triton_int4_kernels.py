"""Triton kernels for products with int4 weights: as `matvec` and `matmul_rows` of triton_kernels.py.

A weight [N, K / 2] is by rows, as models/quantized.py stores it: in each group of inputs, byte i holds input i in its
lower half and input i + GROUP / 2, each as 0 … 15 for -8 … 7. scale [N, K / GROUP].
"""

import triton
import triton.language as tl

from streamllm.compiled.triton_kernels import store_row, store_rows

_RMS, _LAYER = tl.constexpr(1), tl.constexpr(2)  # RMS_NORM and LAYER_NORM of triton_kernels.py


@triton.jit
def matvec(
    x, norm_weight, norm_bias, weight, scale, bias, up_weight, up_scale, up_bias, residual, out,
    N, eps,
    K: tl.constexpr, K_PADDED: tl.constexpr, EVEN_N: tl.constexpr,
    NORM: tl.constexpr, NORM_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GROUP: tl.constexpr,
    BN: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """out [N] = residual + activation(weight @ norm(x) + bias) · (up_weight @ norm(x) + up_bias), for one row x [K].

    A round of the loop reads BG groups. One thread reads a whole group, so it sums the group by itself.
    """
    HALF: tl.constexpr = GROUP // 2
    GROUPS: tl.constexpr = K // GROUP
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1).to(tl.int64)
    i = tl.arange(0, HALF)
    sums = tl.zeros((BN, BG), tl.float32)
    up_sums = tl.zeros((BN, BG), tl.float32)
    squares = tl.zeros((BG, HALF), tl.float32)
    mean = 0.0
    deviation = 1.0
    if NORM == _LAYER:
        every = tl.arange(0, K_PADDED)
        whole = tl.load(x + every, mask=every < K, other=0.0).to(tl.float32)
        mean = tl.sum(whole) / K
        centred = tl.where(every < K, whole - mean, 0.0)
        deviation = tl.rsqrt(tl.sum(centred * centred) / K + eps)
    for start in range(0, GROUPS, BG):
        group = start + tl.arange(0, BG)
        inside = (group < GROUPS)[:, None]
        k = group[:, None] * GROUP + i[None, :]  # [BG, HALF]
        low = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(x + k + HALF, mask=inside, other=0.0).to(tl.float32)
        if NORM == _RMS:
            squares += low * low + high * high
        if NORM == _LAYER:
            low = (low - mean) * deviation
            high = (high - mean) * deviation
        if NORM != 0:
            low = low * tl.load(norm_weight + k, mask=inside, other=0.0).to(tl.float32)
            high = high * tl.load(norm_weight + k + HALF, mask=inside, other=0.0).to(tl.float32)
        if NORM_BIAS:
            low += tl.load(norm_bias + k, mask=inside, other=0.0).to(tl.float32)
            high += tl.load(norm_bias + k + HALF, mask=inside, other=0.0).to(tl.float32)
        at = row[:, None, None] * (K // 2) + (group[:, None] * HALF + i[None, :])[None, :, :]
        scale_at = row[:, None] * GROUPS + group[None, :]
        valid_group = (group < GROUPS)[None, :]
        pairs = tl.load(weight + at, mask=inside[None, :, :], other=0, eviction_policy="evict_first").to(
            tl.int32
        )
        products = ((pairs & 15) - 8).to(tl.float32) * low[None, :, :]
        products += ((pairs >> 4) - 8).to(tl.float32) * high[None, :, :]
        sums += tl.sum(products, 2) * tl.load(scale + scale_at, mask=valid_group, other=0.0).to(tl.float32)
        if GATED:
            pairs = tl.load(
                up_weight + at, mask=inside[None, :, :], other=0, eviction_policy="evict_first"
            ).to(tl.int32)
            products = ((pairs & 15) - 8).to(tl.float32) * low[None, :, :]
            products += ((pairs >> 4) - 8).to(tl.float32) * high[None, :, :]
            up_sums += tl.sum(products, 2) * tl.load(up_scale + scale_at, mask=valid_group, other=0.0).to(
                tl.float32
            )
    result = tl.sum(sums, 1)
    up = tl.sum(up_sums, 1)
    if NORM == _RMS:
        root = tl.rsqrt(tl.sum(squares) / K + eps)
        result = result * root
        up = up * root
    store_row(
        result, up, n, N, bias, up_bias, residual, out, ACTIVATION, GATED, BIAS, RESIDUAL, EVEN_N,
    )  # fmt: skip


@triton.jit
def dequantized(weight, scale, row, at, K: tl.constexpr, GROUP: tl.constexpr, dtype: tl.constexpr):
    """The inputs in the lower and in the upper halves of some bytes `at` [BK] of some rows, [BN, BK] each."""
    inside = (at < K // 2)[None, :]
    pairs = tl.load(weight + row[:, None] * (K // 2) + at[None, :], mask=inside, other=0).to(tl.int32)
    group = row[:, None] * (K // GROUP) + (at // (GROUP // 2))[None, :]
    step = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
    low = ((pairs & 15) - 8).to(tl.float32) * step
    high = ((pairs >> 4) - 8).to(tl.float32) * step
    return low.to(dtype), high.to(dtype)


@triton.jit
def matmul_rows(
    x, weight, scale, bias, up_weight, up_scale, up_bias, residual, out,
    M, N,
    K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """As `matvec`, without the norm, for rows x [M, K]: out [M, N]. Tiles of the weight are dequantised."""
    HALF: tl.constexpr = GROUP // 2
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    row = tl.minimum(n, N - 1).to(tl.int64)
    column = tl.minimum(m, M - 1).to(tl.int64)[None, :] * K
    sums = tl.zeros((BN, BM), tl.float32)
    up_sums = tl.zeros((BN, BM), tl.float32)
    for start in range(0, K // 2, BK):
        at = start + tl.arange(0, BK)
        k = (at // HALF * GROUP + at % HALF)[:, None]
        inside = (at < K // 2)[:, None]
        low_x = tl.load(x + column + k, mask=inside, other=0.0)
        high_x = tl.load(x + column + k + HALF, mask=inside, other=0.0)
        low, high = dequantized(weight, scale, row, at, K, GROUP, low_x.dtype)
        sums = tl.dot(low, low_x, sums, input_precision="ieee")
        sums = tl.dot(high, high_x, sums, input_precision="ieee")
        if GATED:
            low, high = dequantized(up_weight, up_scale, row, at, K, GROUP, low_x.dtype)
            up_sums = tl.dot(low, low_x, up_sums, input_precision="ieee")
            up_sums = tl.dot(high, high_x, up_sums, input_precision="ieee")
    store_rows(
        sums, up_sums, n, m, M, N, bias, up_bias, residual, out, ACTIVATION, GATED, BIAS, RESIDUAL,
    )  # fmt: skip
