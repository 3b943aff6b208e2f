"""Triton kernels for one decoding step. Imported only where they are used: importing Triton takes a second.

All compute in float32. Their results are rounded once, when they are stored. `triton_launch.py` calls them.

Names of the axes: N outputs of a product, K its inputs, M rows (streams), B batch, G key/value heads, D head
dimension. Pointers to tensors that a variant does not read may be any tensor.
"""

import triton
import triton.language as tl

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
def matvec(
    x, norm_weight, norm_bias, weight, scale, bias, up_weight, up_scale, up_bias, residual, out,
    N, eps,
    K: tl.constexpr, K_PADDED: tl.constexpr, EVEN_N: tl.constexpr,
    NORM: tl.constexpr, NORM_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, INT8: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [N] = residual + activation(weight @ norm(x) + bias) · (up_weight @ norm(x) + up_bias), for one row x [K].

    Sums are kept per column of the tile and reduced once at the end. An RMS norm's sum of squares is taken on the
    way. A layer norm reads x once before, because its mean must be subtracted first.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    sums = tl.zeros((BN, BK), tl.float32)
    up_sums = tl.zeros((BN, BK), tl.float32)
    squares = tl.zeros((BK,), tl.float32)
    mean = 0.0
    deviation = 1.0
    if NORM == _LAYER:
        every = tl.arange(0, K_PADDED)
        whole = tl.load(x + every, mask=every < K, other=0.0).to(tl.float32)
        mean = tl.sum(whole) / K
        centred = tl.where(every < K, whole - mean, 0.0)
        deviation = tl.rsqrt(tl.sum(centred * centred) / K + eps)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        if K % BK == 0:
            w = tl.load(weight + row + k[None, :], eviction_policy="evict_first").to(tl.float32)
            value = tl.load(x + k).to(tl.float32)
        else:
            inside = k < K
            w = tl.load(
                weight + row + k[None, :], mask=inside[None, :], other=0.0, eviction_policy="evict_first"
            )
            w = w.to(tl.float32)
            value = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
        if NORM == _RMS:
            squares += value * value
        if NORM == _LAYER:
            value = (value - mean) * deviation
        if NORM != 0:
            value = value * tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32)
        if NORM_BIAS:
            value += tl.load(norm_bias + k, mask=k < K, other=0.0).to(tl.float32)
        sums += w * value[None, :]
        if GATED:
            if K % BK == 0:
                u = tl.load(up_weight + row + k[None, :], eviction_policy="evict_first").to(tl.float32)
            else:
                u = tl.load(
                    up_weight + row + k[None, :],
                    mask=inside[None, :],
                    other=0.0,
                    eviction_policy="evict_first",
                ).to(tl.float32)
            up_sums += u * value[None, :]
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
def matmul_rows(
    x, weight, scale, bias, up_weight, up_scale, up_bias, residual, out,
    M, N,
    K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    INT8: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """As `matvec`, without the norm, for rows x [M, K]: out [M, N]. A program computes BN outputs of BM rows."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    column = tl.minimum(m, M - 1).to(tl.int64)[None, :] * K
    sums = tl.zeros((BN, BM), tl.float32)
    up_sums = tl.zeros((BN, BM), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        inside = k < K
        value = tl.load(x + column + k[:, None], mask=inside[:, None], other=0.0)
        w = tl.load(weight + row + k[None, :], mask=inside[None, :], other=0.0).to(value.dtype)
        sums = tl.dot(w, value, sums, input_precision="ieee")
        if GATED:
            u = tl.load(up_weight + row + k[None, :], mask=inside[None, :], other=0.0).to(value.dtype)
            up_sums = tl.dot(u, value, up_sums, input_precision="ieee")
    valid = n < N
    if INT8:
        sums = sums * tl.load(scale + n, mask=valid, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up_sums = up_sums * tl.load(up_scale + n, mask=valid, other=0.0).to(tl.float32)[:, None]
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
def norm_rows(
    x, added, weight, bias, total, out, eps,
    K: tl.constexpr, K_PADDED: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """out [M, K] = norm(total) and total = x + added, each program one row."""
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
def gate_rows(x, up, out, x_row, up_row, N, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """out [M, N] = activation(x) · up, for rows at any stride."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1).to(tl.int64)
    value = tl.load(x + m * x_row + n, mask=n < N, other=0.0).to(tl.float32)
    other = tl.load(up + m * up_row + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + m * N + n, (activated(value, ACTIVATION) * other).to(out.dtype.element_ty), mask=n < N)


@triton.jit
def rope_tables(
    places, origin, starts, frequencies, out, factor,
    HALF: tl.constexpr, HALF_PADDED: tl.constexpr, SINKS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Cosines and signed sines [kinds, 2, R, 2 · HALF] of the query's place, its place for sinks, and the key's.

    Angles in float64, as in models/rotary.py: the place is split, and the two angles are joined by the addition
    theorem.
    """
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


@triton.jit
def rotated(value, partner, cosines, sines, d, ROTATED: tl.constexpr):
    """The first ROTATED dimensions of rows [..., D] turned; `partner` holds dimension d + ROTATED / 2."""
    cos = tl.load(cosines + d, mask=d < ROTATED, other=1.0).to(tl.float32)
    sin = tl.load(sines + d, mask=d < ROTATED, other=0.0).to(tl.float32)
    return value * cos + partner * sin


@triton.jit
def half_even(x):
    """x rounded to a whole number, halves to even: |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def attention(
    q, k, v, keys, values, key_sinks, value_sinks, key_scales, value_scales, places, starts,
    query_cos, query_sin, sink_cos, sink_sin, key_cos, key_sin, q_norm, k_norm, slopes,
    out, partial, log_sums, arrived,
    scale, bias_scale, clip, q_eps, k_eps, q_row, k_row, v_row, place_row,
    key_batch, key_head, key_slot, key_dim, value_batch, value_head, value_slot, value_dim,
    SINKS: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr,
    D_PADDED: tl.constexpr, SHARED_PADDED: tl.constexpr, ROTATED: tl.constexpr, HEAD_NORMS: tl.constexpr,
    ALIBI: tl.constexpr, CLIP: tl.constexpr, INT8: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: rotate q and k, store k and v in the ring, read all that is held, join the splits.

    Grid [B · HEADS, SPLITS]. The SHARED query heads of one key head are the rows of a tile. The splits divide the
    slots that are held, min(t + 1, SLOTS), evenly. The new token's key and value come from registers, because
    the slot may be written at the same moment. The split that arrives last joins what all have read, by their
    log-sum-exp. arrived [B · HEADS]: 0 before, counts the splits that are done.

    The sinks are scored by the query rotated at min(t - gap, SLOTS - 1), or biased by that distance: the gap is
    how far start lies behind the sinks, where entries were taken out. Keys before start are not seen.
    INT8: keys, values are the numbers of the ring's recent part, with a scale for each; sinks are apart.
    """
    pair = tl.program_id(0)
    split = tl.program_id(1)
    b = pair // HEADS
    g = pair % HEADS
    window: tl.constexpr = SLOTS - SINKS
    t = tl.load(places + b * place_row)
    start_place = tl.load(starts + b * place_row)
    held = tl.minimum(t + 1, SLOTS).to(tl.int32)
    slot = tl.where(t < SINKS, t, SINKS + (t + window - SINKS) % window).to(tl.int32)
    d = tl.arange(0, D_PADDED)
    real = d < D
    half: tl.constexpr = ROTATED // 2
    partner = d
    if ROTATED > 0:
        partner = tl.where(d < ROTATED, (d + half) % ROTATED, d)
    r = tl.arange(0, SHARED_PADDED)
    head = g * SHARED + r
    whole = (r < SHARED)[:, None] & real[None, :]

    query_at = q + b.to(tl.int64) * q_row + head[:, None] * D
    query = tl.load(query_at + d[None, :], mask=whole, other=0.0).to(tl.float32)
    new_key = tl.load(k + b.to(tl.int64) * k_row + g * D + d, mask=real, other=0.0).to(tl.float32)
    new_value = tl.load(v + b.to(tl.int64) * v_row + g * D + d, mask=real, other=0.0).to(tl.float32)
    if CLIP:
        query = tl.minimum(tl.maximum(query, -clip), clip)
        new_key = tl.minimum(tl.maximum(new_key, -clip), clip)
        new_value = tl.minimum(tl.maximum(new_value, -clip), clip)
    sink_query = query
    if ROTATED > 0:
        query_partner = tl.load(query_at + partner[None, :], mask=whole, other=0.0).to(tl.float32)
        key_partner = tl.load(k + b.to(tl.int64) * k_row + g * D + partner, mask=real, other=0.0).to(
            tl.float32
        )
        if CLIP:
            query_partner = tl.minimum(tl.maximum(query_partner, -clip), clip)
            key_partner = tl.minimum(tl.maximum(key_partner, -clip), clip)
    if HEAD_NORMS:
        query_root = tl.rsqrt(tl.sum(query * query, 1) / D + q_eps)[:, None]
        key_root = tl.rsqrt(tl.sum(new_key * new_key) / D + k_eps)
        query = query * query_root * tl.load(q_norm + d, mask=real, other=0.0).to(tl.float32)[None, :]
        new_key = new_key * key_root * tl.load(k_norm + d, mask=real, other=0.0).to(tl.float32)
        sink_query = query
        if ROTATED > 0:
            weight = tl.load(q_norm + partner, mask=real, other=0.0).to(tl.float32)
            query_partner = query_partner * query_root * weight[None, :]
            key_partner = (
                key_partner * key_root * tl.load(k_norm + partner, mask=real, other=0.0).to(tl.float32)
            )
    if ROTATED > 0:
        turn = b * place_row * ROTATED
        sink_query = query
        if SINKS > 0:
            sink_query = rotated(query, query_partner, sink_cos + turn, sink_sin + turn, d[None, :], ROTATED)
        query = rotated(query, query_partner, query_cos + turn, query_sin + turn, d[None, :], ROTATED)
        new_key = rotated(new_key, key_partner, key_cos + turn, key_sin + turn, d, ROTATED)
    query = query.to(out.dtype.element_ty)
    sink_query = sink_query.to(out.dtype.element_ty)
    stored_key = new_key.to(out.dtype.element_ty)
    stored_value = new_value.to(out.dtype.element_ty)

    key_at = keys + b.to(tl.int64) * key_batch + g * key_head
    value_at = values + b.to(tl.int64) * value_batch + g * value_head
    if INT8:
        # As int8_ring.py: the scale is rounded to the ring's type before numbers are divided by it.
        sinks_at = pair.to(tl.int64) * SINKS * D
        scales_at = pair.to(tl.int64) * window
        key_scale = (
            (tl.max(tl.abs(stored_key.to(tl.float32))) / 127.0).to(out.dtype.element_ty).to(tl.float32)
        )
        value_scale = (tl.max(tl.abs(stored_value.to(tl.float32))) / 127.0).to(out.dtype.element_ty)
        value_scale = value_scale.to(tl.float32)
        key_number = half_even(stored_key.to(tl.float32) / tl.maximum(key_scale, 1.1754943508222875e-38))
        value_number = half_even(
            stored_value.to(tl.float32) / tl.maximum(value_scale, 1.1754943508222875e-38)
        )
        key_number = tl.minimum(tl.maximum(key_number, -127.0), 127.0)
        value_number = tl.minimum(tl.maximum(value_number, -127.0), 127.0)
        if split == 0:
            slots = slot + d * 0
            ring = slots - SINKS
            to_sink = real & (slots < SINKS)
            to_ring = real & (slots >= SINKS)
            tl.store(key_sinks + sinks_at + slots * D + d, stored_key, mask=to_sink)
            tl.store(value_sinks + sinks_at + slots * D + d, stored_value, mask=to_sink)
            tl.store(key_at + ring * key_slot + d * key_dim, key_number.to(tl.int8), mask=to_ring)
            tl.store(value_at + ring * value_slot + d * value_dim, value_number.to(tl.int8), mask=to_ring)
            one = to_ring & (d == 0)
            tl.store(
                key_scales + scales_at + ring, (key_scale + d * 0).to(key_scales.dtype.element_ty), mask=one
            )
            tl.store(
                value_scales + scales_at + ring,
                (value_scale + d * 0).to(value_scales.dtype.element_ty),
                mask=one,
            )
        stored_key = tl.where(slot < SINKS, stored_key.to(tl.float32), key_number).to(out.dtype.element_ty)
        stored_value = tl.where(slot < SINKS, stored_value.to(tl.float32), value_number).to(
            out.dtype.element_ty
        )
    elif split == 0:
        tl.store(key_at + slot.to(tl.int64) * key_slot + d * key_dim, stored_key, mask=real)
        tl.store(value_at + slot.to(tl.int64) * value_slot + d * value_dim, stored_value, mask=real)

    # One query head for each key head is no work for matrix units: each slot of the block then has a softmax of its
    # own over the rounds, without a reduction in the loop, and all are joined behind it.
    LANES: tl.constexpr = BLOCK if SHARED == 1 else SHARED_PADDED
    best = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    read = tl.zeros((LANES, D_PADDED), tl.float32)
    if ALIBI:
        slope = tl.load(slopes + head, mask=r < SHARED, other=0.0) * bias_scale
    share = (held + SPLITS * BLOCK - 1) // (SPLITS * BLOCK) * BLOCK
    start = split * share
    for first in range(start, tl.minimum(start + share, held), BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < held
        if INT8:
            ring_at = at - SINKS
            recent = inside & (at >= SINKS)
            is_sink = at < SINKS
            key = tl.load(
                key_at + ring_at[:, None] * key_slot + d[None, :] * key_dim,
                mask=recent[:, None] & real[None, :], other=0,
            ).to(out.dtype.element_ty)  # fmt: skip
            value = tl.load(
                value_at + ring_at[:, None] * value_slot + d[None, :] * value_dim,
                mask=recent[:, None] & real[None, :], other=0,
            ).to(out.dtype.element_ty)  # fmt: skip
            key_factor = tl.load(key_scales + scales_at + ring_at, mask=recent, other=1.0).to(tl.float32)
            value_factor = tl.load(value_scales + scales_at + ring_at, mask=recent, other=1.0).to(tl.float32)
            if SINKS > 0:
                sink_at = sinks_at + at[:, None] * D + d[None, :]
                sunk = (inside & is_sink)[:, None] & real[None, :]
                key = tl.where(is_sink[:, None], tl.load(key_sinks + sink_at, mask=sunk, other=0.0), key)
                value = tl.where(
                    is_sink[:, None], tl.load(value_sinks + sink_at, mask=sunk, other=0.0), value
                )
            is_new = (at == slot) & (at >= SINKS)
            key_factor = tl.where(is_new, key_scale, key_factor)
            value_factor = tl.where(is_new, value_scale, value_factor)
        else:
            here = inside[:, None] & real[None, :]
            place = at.to(tl.int64)[:, None]
            key = tl.load(key_at + place * key_slot + d[None, :] * key_dim, mask=here, other=0.0)
            value = tl.load(value_at + place * value_slot + d[None, :] * value_dim, mask=here, other=0.0)
        key = tl.where((at == slot)[:, None], stored_key[None, :], key)
        value = tl.where((at == slot)[:, None], stored_value[None, :], value)
        if SHARED == 1:
            wide_key = key.to(tl.float32)
            scores = tl.sum(query.to(tl.float32) * wide_key, 1)[None, :]
            if SINKS > 0 and ROTATED > 0:
                if first < SINKS:
                    sink_scores = tl.sum(sink_query.to(tl.float32) * wide_key, 1)[None, :]
                    scores = tl.where((at < SINKS)[None, :], sink_scores, scores)
        else:
            scores = tl.dot(query, tl.trans(key), input_precision="ieee")
            if SINKS > 0 and ROTATED > 0:
                if first < SINKS:
                    sink_scores = tl.dot(sink_query, tl.trans(key), input_precision="ieee")
                    scores = tl.where((at < SINKS)[None, :], sink_scores, scores)
        scores = scores * scale
        if INT8:
            scores = scores * key_factor[None, :]
        back = ((t - at) % window).to(tl.int32)  # of a recent key from the query
        if ALIBI:
            rank = tl.minimum(t - (start_place - SINKS), SLOTS - 1).to(tl.int32)
            distance = tl.where(at < SINKS, rank - at, back)
            scores = scores - slope[:, None] * distance.to(tl.float32)[None, :]
        seen = inside & ((at < SINKS) | (t - back >= start_place))
        scores = tl.where(seen[None, :], scores, float("-inf"))
        if SHARED == 1:
            scores = tl.sum(scores, 0)  # [BLOCK]
            largest = tl.maximum(best, scores)
            level = tl.where(largest == float("-inf"), 0.0, largest)  # where nothing was seen yet
            weights = tl.exp(scores - level)
            fade = tl.exp(best - level)
            total = total * fade + weights
            if INT8:
                weights = weights * value_factor
            read = read * fade[:, None] + weights[:, None] * value.to(tl.float32)
        else:
            largest = tl.maximum(best, tl.max(scores, 1))
            level = tl.where(largest == float("-inf"), 0.0, largest)
            weights = tl.exp(scores - level[:, None])
            fade = tl.exp(best - level)
            total = total * fade + tl.sum(weights, 1)
            if INT8:
                weights = weights * value_factor[None, :]
            read = read * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        best = largest
    if SHARED == 1:
        largest = tl.max(best, 0)
        weights = tl.exp(best - tl.where(largest == float("-inf"), 0.0, largest))
        zero = tl.zeros((1,), tl.float32)
        best = zero + largest
        total = zero + tl.sum(total * weights, 0)
        read = tl.sum(read * weights[:, None], 0)[None, :]
    total = tl.where(total == 0.0, 1.0, total)  # a split without a key
    result_at = out + (pair.to(tl.int64) * SHARED + r[:, None]) * D + d[None, :]
    if SPLITS == 1:
        tl.store(result_at, (read / total[:, None]).to(out.dtype.element_ty), mask=whole)
    else:
        part = (pair * SPLITS + split).to(tl.int64) * SHARED_PADDED + r
        tl.store(partial + part[:, None] * D_PADDED + d[None, :], read / total[:, None], mask=whole)
        tl.store(log_sums + part, best + tl.log(total))
        tl.debug_barrier()  # all threads have stored before one of them counts
        before = tl.atomic_add(arrived + pair, 1, sem="acq_rel")
        if before == SPLITS - 1:
            joined(partial, log_sums, result_at, pair, r, d, whole, SPLITS, SHARED_PADDED, D_PADDED)


@triton.jit
def joined(
    partial, log_sums, result_at, pair, r, d, whole,
    SPLITS: tl.constexpr, SHARED_PADDED: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """Store what the splits of a key head have read, weighed by the sums of their softmax."""
    # Past the first cache, which may hold older values of what other processors have stored.
    best = tl.full((SHARED_PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((SHARED_PADDED,), tl.float32)
    read = tl.zeros((SHARED_PADDED, D_PADDED), tl.float32)
    for split in range(SPLITS):
        part = (pair * SPLITS + split).to(tl.int64) * SHARED_PADDED + r
        log_sum = tl.load(log_sums + part, cache_modifier=".cg")
        one = tl.load(
            partial + part[:, None] * D_PADDED + d[None, :], mask=whole, other=0.0, cache_modifier=".cg"
        )
        largest = tl.maximum(best, log_sum)
        level = tl.where(largest == float("-inf"), 0.0, largest)  # splits without a key
        fade = tl.exp(best - level)
        weight = tl.exp(log_sum - level)
        total = total * fade + weight
        read = read * fade[:, None] + one * weight[:, None]
        best = largest
    tl.store(result_at, (read / total[:, None]).to(result_at.dtype.element_ty), mask=whole)
