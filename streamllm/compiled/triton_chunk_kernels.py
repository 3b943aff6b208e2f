"""Triton kernels for chunks of a prompt: the rotation of all heads, and the sinks beside what flash attention has read.

See triton_kernels.py for what these kernels share.
"""

import triton
import triton.language as tl


@triton.jit
def rotate_heads(
    x, cos, sin, sink_cos, sink_sin, out, sink_out,
    x_batch, x_head, x_token, table_batch, T, HEADS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    ROTATED: tl.constexpr, BOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [B, HEADS, T, D] rotated by the tables [R, T, ROTATED]: out [B, T, HEADS, D]; and by a second pair: sink_out.

    Grid [B · T, HEADS / BLOCK]. Dimensions from ROTATED on are copied.
    """
    b = (tl.program_id(0) // T).to(tl.int64)
    t = tl.program_id(0) % T
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D_PADDED)
    whole = (head < HEADS)[:, None] & (d < D)[None, :]
    half: tl.constexpr = ROTATED // 2
    partner = tl.where(d < ROTATED, (d + half) % ROTATED, d)
    at = x + b * x_batch + head.to(tl.int64)[:, None] * x_head + t.to(tl.int64) * x_token
    value = tl.load(at + d[None, :], mask=whole, other=0.0).to(tl.float32)
    other = tl.load(at + partner[None, :], mask=whole, other=0.0).to(tl.float32)
    turns = b * table_batch + t * ROTATED + d
    c = tl.load(cos + turns, mask=d < ROTATED, other=1.0).to(tl.float32)[None, :]
    s = tl.load(sin + turns, mask=d < ROTATED, other=0.0).to(tl.float32)[None, :]
    to = (tl.program_id(0).to(tl.int64) * HEADS + head[:, None]) * D + d[None, :]
    tl.store(out + to, (value * c + other * s).to(out.dtype.element_ty), mask=whole)
    if BOTH:
        c = tl.load(sink_cos + turns, mask=d < ROTATED, other=1.0).to(tl.float32)[None, :]
        s = tl.load(sink_sin + turns, mask=d < ROTATED, other=0.0).to(tl.float32)[None, :]
        tl.store(sink_out + to, (value * c + other * s).to(out.dtype.element_ty), mask=whole)


@triton.jit
def join_sinks(
    query, keys, values, run, log_sums, out,
    key_batch, key_head, key_slot, value_batch, value_head, value_slot,
    T, first, place, scale, SINKS: tl.constexpr, HEADS: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr,
    D_PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [B, T, H, D]: one softmax over the sinks and what `run` [B, T - first, H, D] has read, by its log-sum-exp.

    query [B, T, H, D] is rotated for the sinks, the first SINKS of keys and values [B, HEADS, K, D]. Query i is at
    place + i and sees the sinks up to its own place. Queries before `first` see nothing else. log_sums
    [B, H, T - first].

    Grid [T · SHARED / ROWS, B · HEADS]: the SHARED query heads of one key head, for some tokens, are the rows.
    """
    b = (tl.program_id(1) // HEADS).to(tl.int64)
    g = tl.program_id(1) % HEADS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = row // SHARED
    head = g * SHARED + row % SHARED
    d = tl.arange(0, D_PADDED)
    real = d < D
    heads: tl.constexpr = HEADS * SHARED
    at = ((b * T + token)[:, None] * heads + head[:, None]) * D + d[None, :]
    whole = (token < T)[:, None] & real[None, :]
    q = tl.load(query + at, mask=whole, other=0.0)
    has_run = (token >= first) & (token < T)
    length = T - first
    log_sum = tl.load(
        log_sums + (b * heads + head) * length + token - first, mask=has_run, other=float("-inf")
    ).to(tl.float32)
    at_run = ((b * length + token - first)[:, None] * heads + head[:, None]) * D + d[None, :]
    read = tl.load(run + at_run, mask=has_run[:, None] & real[None, :], other=0.0).to(tl.float32)
    best = log_sum
    total = tl.where(has_run, 1.0, 0.0)
    for start in range(0, SINKS, BLOCK):
        sink = start + tl.arange(0, BLOCK)
        here = (sink < SINKS)[:, None] & real[None, :]
        key_at = b * key_batch + g * key_head + sink[:, None] * key_slot + d[None, :]
        value_at = b * value_batch + g * value_head + sink[:, None] * value_slot + d[None, :]
        key = tl.load(keys + key_at, mask=here, other=0.0)
        value = tl.load(values + value_at, mask=here, other=0.0)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
        seen = (sink < SINKS)[None, :] & (sink[None, :] <= (place + token)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        largest = tl.maximum(best, tl.max(scores, 1))
        level = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp(scores - level[:, None])
        fade = tl.exp(best - level)
        total = total * fade + tl.sum(weights, 1)
        read = read * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        if value.dtype != tl.float32:  # sinks have large weights, so what their rounding cut off is added
            rest = weights - weights.to(value.dtype).to(tl.float32)
            read += tl.dot(rest.to(value.dtype), value)
        best = largest
    total = tl.where(total == 0.0, 1.0, total)  # rows past the last token
    tl.store(out + at, (read / total[:, None]).to(out.dtype.element_ty), mask=whole)
