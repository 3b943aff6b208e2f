"""Triton kernels for one decoding step. Imported only where they are used: importing Triton takes a second.

All compute in float32. Their results are rounded once, when they are stored. `triton_launch.py` calls them.

Names of the axes: N outputs of a product, K its inputs, M rows (streams), B batch, G key/value heads, D head
dimension. Pointers to tensors that a variant does not read may be any tensor.
"""

import triton
import triton.language as tl

from streamllm.compiled.triton_kernel_helpers import after_previous, before_next, int8_to, to_float

NO_NORM, RMS_NORM, LAYER_NORM = 0, 1, 2
NONE, SILU, RELU, GELU, GELU_TANH, GELU_FAST, QUICK_GELU = range(7)
# The same numbers for the kernels, which read no plain globals.
_RMS, _LAYER = tl.constexpr(RMS_NORM), tl.constexpr(LAYER_NORM)
_SILU, _RELU, _GELU = tl.constexpr(SILU), tl.constexpr(RELU), tl.constexpr(GELU)
_GELU_TANH, _GELU_FAST = tl.constexpr(GELU_TANH), tl.constexpr(GELU_FAST)
_QUICK_GELU = tl.constexpr(QUICK_GELU)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == _SILU:
        x = x * tl.sigmoid(x)
    elif ACTIVATION == _RELU:
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == _GELU:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif (ACTIVATION == _GELU_TANH) or (ACTIVATION == _GELU_FAST):
        # 1 + tanh(u) = 2 sigmoid(2u)
        x = x * tl.sigmoid(2.0 * 0.7978845608028654 * x * (1.0 + 0.044715 * x * x))
    elif ACTIVATION == _QUICK_GELU:
        x = x * tl.sigmoid(1.702 * x)
    return x


@triton.jit
def loaded(weight, row, k, K: tl.constexpr, BK: tl.constexpr):
    """A tile [BN, BK] of a weight, whose rows begin at `row`."""
    if K % BK == 0:
        w = tl.load(weight + row + k[None, :], eviction_policy="evict_first")
    else:
        w = tl.load(
            weight + row + k[None, :], mask=(k < K)[None, :], other=0.0, eviction_policy="evict_first"
        )
    return w


@triton.jit
def weighed(
    w, u, x, norm_weight, norm_bias, k, mean, deviation, sums, up_sums, squares,
    K: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, NORM_BIAS: tl.constexpr, GATED: tl.constexpr,
    PTX: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """The sums of `matvec` with one tile of the weights, w and u [BN, BK], added."""
    if K % BK == 0:
        value = tl.load(x + k).to(tl.float32)
    else:
        value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if NORM == _RMS:
        squares += value * value
    if NORM == _LAYER:
        value = (value - mean) * deviation
    if NORM != 0:
        if K % BK == 0:
            value = value * tl.load(norm_weight + k).to(tl.float32)
        else:
            value = value * tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32)
    if NORM_BIAS:
        value += tl.load(norm_bias + k, mask=k < K, other=0.0).to(tl.float32)
    BN: tl.constexpr = w.shape[0]
    COLUMNS: tl.constexpr = BK // FOLD
    if FOLD == 1:
        sums += to_float(w, PTX) * value[None, :]
        if GATED:
            up_sums += to_float(u, PTX) * value[None, :]
    else:
        sums += tl.sum(tl.reshape(to_float(w, PTX) * value[None, :], (BN, COLUMNS, FOLD)), 2)
        if GATED:
            up_sums += tl.sum(tl.reshape(to_float(u, PTX) * value[None, :], (BN, COLUMNS, FOLD)), 2)
    return sums, up_sums, squares


@triton.jit
def store_row(
    result, up, n, N, bias, up_bias, residual, out,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """The end of `matvec`: products of one row, and what is done to them before they are stored."""
    valid = n < N
    if BIAS:
        result += tl.load(bias + n, mask=valid, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(up_bias + n, mask=valid, other=0.0).to(tl.float32)
    result = activated(result, ACTIVATION)
    if GATED:
        result = result * up
    if RESIDUAL:
        result += tl.load(residual + n, mask=valid, other=0.0).to(tl.float32)
    if EVEN_N:
        tl.store(out + n, result.to(out.dtype.element_ty))
    else:
        tl.store(out + n, result.to(out.dtype.element_ty), mask=valid)


@triton.jit
def store_rows(
    sums, up_sums, n, m, M, N, bias, up_bias, residual, out,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """The end of `matmul_rows`: products of some rows, and what is done to them before they are stored."""
    valid = n < N
    if BIAS:
        sums += tl.load(bias + n, mask=valid, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up_sums += tl.load(up_bias + n, mask=valid, other=0.0).to(tl.float32)[:, None]
    sums = activated(sums, ACTIVATION)
    if GATED:
        sums = sums * up_sums
    at = m[None, :].to(tl.int64) * N + n[:, None]
    both = valid[:, None] & (m < M)[None, :]
    if RESIDUAL:
        sums += tl.load(residual + at, mask=both, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=both)


@triton.jit
def matvec(
    x, norm_weight, norm_bias, weight, scale, bias, up_weight, up_scale, up_bias, residual, out,
    N, eps,
    K: tl.constexpr, K_PADDED: tl.constexpr, EVEN_N: tl.constexpr,
    NORM: tl.constexpr, NORM_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, INT8: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr, PTX: tl.constexpr, AHEAD: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """out [N] = residual + activation(weight @ norm(x) + bias) · (up_weight @ norm(x) + up_bias), for one row x [K].

    Sums are kept per column of the tile and reduced once at the end. An RMS norm's sum of squares is taken on the
    way. A layer norm reads x once before, because its mean must be subtracted first. The first tile of the weights
    is on its way before the kernel that computes x has ended.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    k = tl.arange(0, BK)
    if AHEAD == 1:
        w = loaded(weight, row, k, K, BK)
        u = w
        if GATED:
            u = loaded(up_weight, row, k, K, BK)
    after_previous(EARLY)
    mean = 0.0
    deviation = 1.0
    if NORM == _LAYER:
        every = tl.arange(0, K_PADDED)
        whole = tl.load(x + every, mask=every < K, other=0.0).to(tl.float32)
        mean = tl.sum(whole) / K
        centred = tl.where(every < K, whole - mean, 0.0)
        deviation = tl.rsqrt(tl.sum(centred * centred) / K + eps)
    sums = tl.zeros((BN, BK // FOLD), tl.float32)
    up_sums = tl.zeros((BN, BK // FOLD), tl.float32)
    squares = tl.zeros((BK,), tl.float32)
    BEGIN: tl.constexpr = BK if AHEAD == 1 else 0
    if AHEAD == 1:
        sums, up_sums, squares = weighed(
            w, u, x, norm_weight, norm_bias, k, mean, deviation, sums, up_sums, squares, K, BK, NORM, NORM_BIAS, GATED,
            PTX, FOLD,
        )  # fmt: skip
    for start in range(BEGIN, K, BK):
        k = start + tl.arange(0, BK)
        w = loaded(weight, row, k, K, BK)
        u = w
        if GATED:
            u = loaded(up_weight, row, k, K, BK)
        sums, up_sums, squares = weighed(
            w, u, x, norm_weight, norm_bias, k, mean, deviation, sums, up_sums, squares, K, BK, NORM, NORM_BIAS, GATED,
            PTX, FOLD,
        )  # fmt: skip
    before_next(EARLY)
    result = tl.sum(sums, 1)
    up = tl.sum(up_sums, 1)
    if NORM == _RMS:
        root = tl.rsqrt(tl.sum(squares) / K + eps)
        result = result * root
        up = up * root
    valid = n < N
    if INT8:
        result = result * tl.load(scale + n, mask=valid, other=0.0).to(tl.float32)
        if GATED:
            up = up * tl.load(up_scale + n, mask=valid, other=0.0).to(tl.float32)
    store_row(
        result, up, n, N, bias, up_bias, residual, out, ACTIVATION, GATED, BIAS, RESIDUAL, EVEN_N,
    )  # fmt: skip


@triton.jit
def matmul_rows(
    x, weight, scale, bias, up_weight, up_scale, up_bias, residual, out,
    M, N,
    K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    INT8: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """As `matvec`, without the norm, for rows x [M, K]: out [M, N]. A program computes BN outputs of BM rows."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    column = tl.minimum(m, M - 1).to(tl.int64)[None, :] * K
    sums = tl.zeros((BN, BM), tl.float32)
    up_sums = tl.zeros((BN, BM), tl.float32)
    after_previous(EARLY)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        inside = k < K
        value = tl.load(x + column + k[:, None], mask=inside[:, None], other=0.0)
        w = tl.load(weight + row + k[None, :], mask=inside[None, :], other=0.0)
        if INT8:
            w = int8_to(w, x.dtype.element_ty, PTX)
        sums = tl.dot(w, value, sums, input_precision="ieee")
        if GATED:
            u = tl.load(up_weight + row + k[None, :], mask=inside[None, :], other=0.0)
            if INT8:
                u = int8_to(u, x.dtype.element_ty, PTX)
            up_sums = tl.dot(u, value, up_sums, input_precision="ieee")
    before_next(EARLY)
    valid = n < N
    if INT8:
        sums = sums * tl.load(scale + n, mask=valid, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up_sums = up_sums * tl.load(up_scale + n, mask=valid, other=0.0).to(tl.float32)[:, None]
    store_rows(
        sums, up_sums, n, m, M, N, bias, up_bias, residual, out, ACTIVATION, GATED, BIAS, RESIDUAL,
    )  # fmt: skip


@triton.jit
def norm_rows(
    x, added, weight, bias, total, out, eps,
    K: tl.constexpr, K_PADDED: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, ADDED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out [M, K] = norm(total) and total = x + added, each program one row."""
    after_previous(EARLY)
    before_next(EARLY)
    k = tl.arange(0, K_PADDED)
    inside = k < K
    start = tl.program_id(0).to(tl.int64) * K
    value = tl.load(x + start + k, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        value += tl.load(added + start + k, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + start + k, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if NORM == _LAYER:
        value = tl.where(inside, value - tl.sum(value) / K, 0.0)
    value = value * tl.rsqrt(tl.sum(value * value) / K + eps)
    value = value * tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + k, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_rows(
    x, up, out, x_row, up_row, N, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """out [M, N] = activation(x) · up, for rows at any stride."""
    after_previous(EARLY)
    before_next(EARLY)
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + m * x_row + n, mask=n < N, other=0.0).to(tl.float32)
    other = tl.load(up + m * up_row + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + m * N + n, (activated(value, ACTIVATION) * other).to(out.dtype.element_ty), mask=n < N)


@triton.jit
def rope_tables(
    places, origin, starts, frequencies, out, factor,
    HALF: tl.constexpr, HALF_PADDED: tl.constexpr, SINKS: tl.constexpr, SLOTS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Cosines and signed sines [kinds, 2, R, 2 · HALF] of the query's place, its place for sinks, and the key's.

    Angles in float64, as in models/rotary.py: the place is split, and the two angles are joined by the addition
    theorem.
    """
    after_previous(EARLY)
    before_next(EARLY)
    kind = tl.program_id(0)
    r = tl.program_id(1)
    t = tl.load(places + r)
    first = tl.load(origin)
    place = t + first
    if kind == 1:
        place = tl.minimum(t - (tl.load(starts + r) - SINKS), SLOTS - 1)
    if kind == 2:
        place = tl.where(t < SINKS, t, place)
    i = tl.arange(0, HALF_PADDED)
    inside = i < HALF
    frequency = tl.load(frequencies + i, mask=inside, other=0.0)
    coarse = ((place >> 20) << 20).to(tl.float64) * frequency
    fine = (place & 0xFFFFF).to(tl.float64) * frequency
    coarse_cos, coarse_sin, fine_cos, fine_sin = tl.cos(coarse), tl.sin(coarse), tl.cos(fine), tl.sin(fine)
    cos = ((coarse_cos * fine_cos - coarse_sin * fine_sin) * factor).to(tl.float32)
    sin = ((coarse_sin * fine_cos + coarse_cos * fine_sin) * factor).to(tl.float32)
    rows = tl.num_programs(1)
    cosines = out + (kind * 2 * rows + r) * 2 * HALF + i
    sines = cosines + rows * 2 * HALF
    tl.store(cosines, cos, mask=inside)
    tl.store(cosines + HALF, cos, mask=inside)
    tl.store(sines, -sin, mask=inside)
    tl.store(sines + HALF, sin, mask=inside)
