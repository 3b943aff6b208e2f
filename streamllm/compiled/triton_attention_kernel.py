"""The Triton kernel for the attention of one token, with the rotation before it and the write to the ring.

See triton_kernels.py for what these kernels share.
"""

import triton
import triton.language as tl


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
