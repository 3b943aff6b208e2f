"""The Triton kernel for the attention of one token, with the rotation before it and the write to the ring.

See triton_kernels.py for what these kernels share.
"""

import triton
import triton.language as tl

from streamllm.compiled.triton_kernel_helpers import after_previous, before_next, int8_to


@triton.jit
def rotated(value, partner, cosines, sines, d, ROTATED: tl.constexpr):
    """The first ROTATED dimensions of rows [..., D], rotated; `partner` holds dimension d + ROTATED / 2."""
    cos = tl.load(cosines + d, mask=d < ROTATED, other=1.0).to(tl.float32)
    sin = tl.load(sines + d, mask=d < ROTATED, other=0.0).to(tl.float32)
    return value * cos + partner * sin


@triton.jit
def half_even(x):
    """x rounded to a whole number, halves to even: |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def scored(query, key, ONE: tl.constexpr):
    """q · k: [1, BLOCK] for ONE query head, else [heads, BLOCK]."""
    if ONE:
        scores = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1)[None, :]
    else:
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    return scores


@triton.jit
def weighted(scores, value, factor, best, total, read, ONE: tl.constexpr, FACTORS: tl.constexpr):
    """The running softmax with the values of a block added. What is not seen has a score of -inf.

    For ONE query head, the softmax of each slot of a block is its own: no reduction is in the loop.
    """
    if ONE:
        scores = tl.sum(scores, 0)  # [BLOCK]
        largest = tl.maximum(best, scores)
    else:
        largest = tl.maximum(best, tl.max(scores, 1))
    level = tl.where(largest == float("-inf"), 0.0, largest)  # where nothing was seen yet
    fade = tl.exp(best - level)
    if ONE:
        weights = tl.exp(scores - level)
        total = total * fade + weights
        if FACTORS:
            weights = weights * factor
        read = read * fade[:, None] + weights[:, None] * value.to(tl.float32)
    else:
        weights = tl.exp(scores - level[:, None])
        total = total * fade + tl.sum(weights, 1)
        if FACTORS:
            weights = weights * factor[None, :]
        read = read * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return largest, total, read


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
    SINK_BLOCK: tl.constexpr, JOINED_HEADS: tl.constexpr, JOINED_SPLITS: tl.constexpr, EARLY: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """One token: rotate q and k, store k and v in the ring, read all that is held, join the splits.

    Grid [B · HEADS, SPLITS]. The SHARED query heads of one key head are the rows of a tile. The splits divide the
    sinks, and the recent slots that are held, evenly. The first split begins with the new token, whose key and value
    come from registers: its slot is written at the same moment, so nobody reads that. The split that arrives last
    joins what all have read, by their log-sum-exp. arrived [B · HEADS]: 0 before, counts the splits that are done.

    The sinks are scored by the query rotated at min(t - gap, SLOTS - 1), or biased by that distance: the gap is
    how far start lies after the sinks, where entries were taken out. Keys before start are not seen.
    INT8: keys, values are the numbers of the ring's recent part, with a scale for each; sinks are apart.
    """
    pair = tl.program_id(0)
    split = tl.program_id(1)
    b = pair // HEADS
    g = pair % HEADS
    ONE: tl.constexpr = SHARED == 1
    window: tl.constexpr = SLOTS - SINKS
    dtype: tl.constexpr = out.dtype.element_ty
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
    key_at = keys + b.to(tl.int64) * key_batch + g * key_head
    value_at = values + b.to(tl.int64) * value_batch + g * value_head
    sink_keys_at, sink_values_at = key_at, value_at
    if not INT8:
        key_at += SINKS * key_slot
        value_at += SINKS * value_slot
    recent = held - SINKS
    share = (recent + SPLITS * BLOCK - 1) // (SPLITS * BLOCK) * BLOCK
    begin = split * share
    after_previous(EARLY)

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
    query = query.to(dtype)
    sink_query = sink_query.to(dtype)
    stored_key = new_key.to(dtype).to(tl.float32)
    stored_value = new_value.to(dtype).to(tl.float32)

    sinks_at = pair.to(tl.int64) * SINKS * D
    scales_at = pair.to(tl.int64) * window
    if INT8:
        # As int8_ring.py: the scale is rounded to the ring's type before numbers are divided by it.
        key_scale = (tl.max(tl.abs(stored_key)) / 127.0).to(dtype).to(tl.float32)
        value_scale = (tl.max(tl.abs(stored_value)) / 127.0).to(dtype).to(tl.float32)
        key_number = half_even(stored_key / tl.maximum(key_scale, 1.1754943508222875e-38))
        value_number = half_even(stored_value / tl.maximum(value_scale, 1.1754943508222875e-38))
        key_number = tl.minimum(tl.maximum(key_number, -127.0), 127.0)
        value_number = tl.minimum(tl.maximum(value_number, -127.0), 127.0)
        if split == 0:
            slots = slot + d * 0
            ring = slots - SINKS
            to_sink = real & (slots < SINKS)
            to_ring = real & (slots >= SINKS)
            tl.store(key_sinks + sinks_at + slots * D + d, stored_key.to(dtype), mask=to_sink)
            tl.store(value_sinks + sinks_at + slots * D + d, stored_value.to(dtype), mask=to_sink)
            tl.store(key_at + ring * key_slot + d * key_dim, key_number.to(tl.int8), mask=to_ring)
            tl.store(value_at + ring * value_slot + d * value_dim, value_number.to(tl.int8), mask=to_ring)
            one = to_ring & (d == 0)
            tl.store(key_scales + scales_at + ring, (key_scale + d * 0).to(dtype), mask=one)
            tl.store(value_scales + scales_at + ring, (value_scale + d * 0).to(dtype), mask=one)
        if slot >= SINKS:
            stored_key = key_number * key_scale
            stored_value = value_number * value_scale
    else:
        if split == 0:
            place = slot.to(tl.int64)
            tl.store(sink_keys_at + place * key_slot + d * key_dim, stored_key.to(dtype), mask=real)
            tl.store(sink_values_at + place * value_slot + d * value_dim, stored_value.to(dtype), mask=real)
    if ALIBI:
        slope = tl.load(slopes + head, mask=r < SHARED, other=0.0) * bias_scale
        rank = tl.minimum(t - (start_place - SINKS), SLOTS - 1).to(tl.int32)

    # The new token. As a sink, it is rotated at the place of the query for the sinks.
    LANES: tl.constexpr = BLOCK if ONE else SHARED_PADDED
    own_query = query.to(tl.float32)
    if SINKS > 0 and ROTATED > 0:
        if t < SINKS:
            own_query = sink_query.to(tl.float32)
    own_score = tl.sum(own_query * stored_key[None, :], 1) * scale
    lane = tl.arange(0, LANES)
    if ONE:
        begins = (lane == 0) & (split == 0)
        best = tl.where(begins, tl.sum(own_score), float("-inf"))
    else:
        begins = (lane >= 0) & (split == 0)
        best = tl.where(begins, own_score, float("-inf"))
    total = tl.where(begins, 1.0, 0.0)
    read = tl.where(begins[:, None], stored_value[None, :], 0.0)

    for first in range(split * SINK_BLOCK, tl.minimum(SINKS, held), SPLITS * SINK_BLOCK):
        at = first + tl.arange(0, SINK_BLOCK)
        seen = (at < SINKS) & (at < held) & (at != slot)
        here = seen[:, None] & real[None, :]
        if INT8:
            place = sinks_at + at[:, None] * D + d[None, :]
            key = tl.load(key_sinks + place, mask=here, other=0.0)
            value = tl.load(value_sinks + place, mask=here, other=0.0)
        else:
            key = tl.load(sink_keys_at + at[:, None] * key_slot + d[None, :] * key_dim, mask=here, other=0.0)
            value = tl.load(
                sink_values_at + at[:, None] * value_slot + d[None, :] * value_dim, mask=here, other=0.0
            )
        scores = scored(sink_query, key, ONE) * scale
        if ALIBI:
            scores = scores - slope[:, None] * (rank - at).to(tl.float32)[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        best, total, read = weighted(scores, value, 1.0, best, total, read, ONE, False)

    newest = slot - SINKS
    reach = tl.minimum(t - start_place, window).to(tl.int32)  # how far back the query sees
    for first in range(begin, tl.minimum(begin + share, recent), BLOCK):
        at = first + tl.arange(0, BLOCK)  # in the ring after the sinks
        back = newest - at
        back = tl.where(back < 0, back + window, back)  # of a key from the query
        seen = (at < recent) & (at != newest)
        here = seen[:, None] & real[None, :]
        place = at[:, None]
        if SLOTS * D_PADDED >= 2147483648:
            place = place.to(tl.int64)
        key = tl.load(key_at + place * key_slot + d[None, :] * key_dim, mask=here, other=0)
        value = tl.load(value_at + place * value_slot + d[None, :] * value_dim, mask=here, other=0)
        factor = 1.0
        if INT8:
            key = int8_to(key, dtype, PTX)
            value = int8_to(value, dtype, PTX)
            factor = tl.load(value_scales + scales_at + at, mask=seen, other=0.0).to(tl.float32)
        scores = scored(query, key, ONE) * scale
        if INT8:
            key_factor = tl.load(key_scales + scales_at + at, mask=seen, other=1.0).to(tl.float32)
            scores = scores * key_factor[None, :]
        if ALIBI:
            scores = scores - slope[:, None] * back.to(tl.float32)[None, :]
        scores = tl.where((seen & (back <= reach))[None, :], scores, float("-inf"))
        best, total, read = weighted(scores, value, factor, best, total, read, ONE, INT8)

    before_next(EARLY)
    if ONE:
        largest = tl.max(best, 0)
        weights = tl.exp(best - tl.where(largest == float("-inf"), 0.0, largest))
        zero = tl.zeros((1,), tl.float32)
        best = zero + largest
        total = zero + tl.sum(total * weights, 0)
        read = tl.sum(read * weights[:, None], 0)[None, :]
    total = tl.where(total == 0.0, 1.0, total)  # a split without a key
    first_head = pair.to(tl.int64) * SHARED
    if SPLITS == 1:
        tl.store(
            out + (first_head + r[:, None]) * D + d[None, :], (read / total[:, None]).to(dtype), mask=whole
        )
    else:
        part = (pair * SPLITS + split).to(tl.int64) * SHARED + r
        tl.store(partial + part[:, None] * D_PADDED + d[None, :], read / total[:, None], mask=whole)
        tl.store(log_sums + part, best + tl.log(total), mask=r < SHARED)
        tl.debug_barrier()  # all threads have stored before one of them counts
        before = tl.atomic_add(arrived + pair, 1, sem="acq_rel")
        if before == SPLITS - 1:
            joined(
                partial,
                log_sums,
                out + first_head * D,
                pair,
                SPLITS,
                SHARED,
                D,
                D_PADDED,
                JOINED_HEADS,
                JOINED_SPLITS,
            )


@triton.jit
def joined(
    partial, log_sums, result_at, pair,
    SPLITS: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    JOINED_HEADS: tl.constexpr, JOINED_SPLITS: tl.constexpr,
):  # fmt: skip
    """Store what the splits of a key head have read, weighed by the sums of their softmax.

    Some splits at a time are loaded together: one after the other, each would wait for memory.
    """
    r = tl.arange(0, JOINED_HEADS)
    d = tl.arange(0, D_PADDED)
    best = tl.full((JOINED_HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((JOINED_HEADS,), tl.float32)
    read = tl.zeros((JOINED_HEADS, D_PADDED), tl.float32)
    for first in range(0, SPLITS, JOINED_SPLITS):
        split = first + tl.arange(0, JOINED_SPLITS)
        part = (pair * SPLITS + split).to(tl.int64)[:, None] * SHARED + r[None, :]
        there = (split < SPLITS)[:, None] & (r < SHARED)[None, :]
        # Past the first cache, which may hold older values of what other processors have stored.
        log_sum = tl.load(log_sums + part, mask=there, other=float("-inf"), cache_modifier=".cg")
        one = tl.load(
            partial + part[:, :, None] * D_PADDED + d[None, None, :], mask=there[:, :, None], other=0.0,
            cache_modifier=".cg",
        )  # fmt: skip
        largest = tl.maximum(best, tl.max(log_sum, 0))
        level = tl.where(largest == float("-inf"), 0.0, largest)  # splits without a key
        fade = tl.exp(best - level)
        weight = tl.exp(log_sum - level[None, :])
        total = total * fade + tl.sum(weight, 0)
        read = read * fade[:, None] + tl.sum(one * weight[:, :, None], 0)
        best = largest
    whole = (r < SHARED)[:, None] & (d < D)[None, :]
    total = tl.where(total == 0.0, 1.0, total)  # padded heads
    tl.store(
        result_at + r[:, None] * D + d[None, :],
        (read / total[:, None]).to(result_at.dtype.element_ty),
        mask=whole,
    )
