"""attend(): the softmax of the project, and the choice of the kernel that computes it.

`kernel_for` chooses one of three kernels by the first row of this table that fits.

device   queries   visibility        sinks apart   bias             kernel
any      1         any               yes           any              one_softmax
any      2 …       band              yes           any              tiles
any      2 …       by places         yes           any              one_softmax
any      2 …       band              no            in a half type   tiles
any      any       any               no            in a half type   one_softmax
cpu      1         any               no            any              one_softmax
cpu      2 …       band, not causal  no            any              tiles
cuda     2 …       band, not causal  no            none, half type  tiles
any      any       any               no            any              fused

Why (tools/bench.py decode, AMD EPYC, 2026-11): one query reads the cache at memory speed by two matmuls, 4 to 5
times as fast as the fused kernel in bfloat16, and a little faster in float32. For 512 queries and W = 1024,
tiles take half the time of one kernel with all keys. The fused kernel has one query for all keys, so sinks
that stand apart need another. With a bias in a half type, it keeps unrounded scores, which exceeds the
parity limit of half types (1.02 times; the others reach 0.89 to 0.97), and it would round the bias.

Inside `tiles`, the sinks and the recent tokens are read apart. Each read returns ``(out, lse)``: the attention over
its keys, and the logarithm of the sum that its softmax was divided by. `merge` joins reads, as if one softmax had run
over all their keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from streamllm.models.processor import IS_INTEL
from streamllm.models.step import Step, is_visible
from streamllm.models.torch_private import flash_attention_cpu, flash_attention_cuda

Read = tuple[Tensor, Tensor]  # out [B, H, T, D] and lse [B, H, T]

EVEN_KEYS = 16  # for one query
EVEN_QUERIES = 64  # for several

TILE_QUERIES = 64  # tools/bench.py score, AMD EPYC, 2026-11: 32 to 256 are within 10 %, 512 is not
TILE_QUERIES_AMX = (
    128  # half types, tools/bench.py score, Xeon with AMX, 2026-11: 1.03 to 1.2 times as fast as 64
)
TILE_QUERIES_ACCELERATOR = 512  # not measured


def attend(
    query: Tensor,
    sink_query: Tensor | None,
    keys: Tensor,
    values: Tensor,
    step: Step,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q·k + bias, over the visible keys) · values.

    query [B, H, T, D] meets recent keys; sink_query, of the same shape, meets the first `step.sinks` keys (None:
    `query` meets them, too). keys, values [B, G, K, D] with G dividing H: query heads j·H/G … share key head j,
    which is never copied. bias [R, H, T, K] in float32 or wider, added after scaling. Returns [B, H, T, D] in
    the type of the values. The softmax runs in float32 for half types.
    """
    if not step.sinks:
        sink_query = None
    if keys.dtype != values.dtype:  # under autocast, rotations are wider than products
        query, keys = query.to(values.dtype), keys.to(values.dtype)
        sink_query = None if sink_query is None else sink_query.to(values.dtype)
    name = kernel_for(query, sink_query, step, bias)
    return KERNELS[name](query, sink_query, keys, values, step, scale, bias)


def kernel_for(query: Tensor, sink_query: Tensor | None, step: Step, bias: Tensor | None) -> str:
    """Which kernel of `KERNELS` serves: the table at the top of this file."""
    many = query.shape[2] > 1
    on_cpu = query.device.type == "cpu"
    apart = sink_query is not None
    half_bias = bias is not None and query.dtype != _wide(query.dtype)
    tileable = many and step.band is not None
    if apart or half_bias:
        return "tiles" if tileable else "one_softmax"
    if on_cpu and not many:
        return "one_softmax"
    windowed = on_cpu or (bias is None and _flash_cuda_serves(query))
    if windowed and tileable and not step.is_causal:
        return "tiles"
    return "fused"


def one_softmax(
    query: Tensor,
    sink_query: Tensor | None,
    keys: Tensor,
    values: Tensor,
    step: Step,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    """Two matmuls and one softmax over all keys. The scores of the sinks come from their own query."""
    sinks = None if sink_query is None else (sink_query, keys[:, :, : step.sinks])
    scores = _scores(query, keys, scale, sinks)
    if bias is not None:
        scores = scores + bias
    mask = step.visible if step.band is None else step.mask()
    if mask is not None:
        scores = scores.masked_fill_(~mask[:, None], -torch.inf)
    return _weighted(scores.softmax(-1), values)


def tiles(
    query: Tensor,
    sink_query: Tensor | None,
    keys: Tensor,
    values: Tensor,
    step: Step,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    """Some queries at a time, each tile beside the keys of its band. The sinks are read apart, and merged."""
    band = step.band
    assert band is not None
    T, columns, rows = query.shape[2], band.columns, _tile_queries(query)
    wide = _wide(query.dtype)
    fusable = query.device.type == "cpu" and (bias is None or query.dtype == wide)
    if sink_query is None:
        sink_query = query
    sinks = keys[:, :, :columns].to(wide), values[:, :, :columns].to(wide)  # few: exact costs little

    def read_sinks(start: int, stop: int) -> Read:
        added = _joined_bias(
            None if bias is None else bias[:, :, start:stop, :columns],
            _as_bias(band.sink_mask(start, stop, query.device), wide),
        )
        return _by_matmul(sink_query[:, :, start:stop].to(wide), *sinks, scale, added)

    # As in rotary.py, nothing is kept while a model is traced.
    run_bias = _run_bias.__wrapped__ if torch.compiler.is_compiling() else _run_bias

    def read_run(start: int, stop: int) -> Read:
        low, high = band.run(start, stop)
        in_front = band.start + start - (band.first + low - columns)  # keys of the run before the first query
        # A fused kernel must see a key for each query: the first queries of a text may be sinks, and see none here.
        fuse = fusable and band.start + start >= band.sinks
        added = _joined_bias(
            None if bias is None else bias[:, :, start:stop, low:high],
            run_bias(
                stop - start, high - low, in_front, band.window, query.dtype if fuse else wide, query.device
            ),
        )
        kernel = _by_flash if fuse else _by_matmul
        return kernel(query[:, :, start:stop], keys[:, :, low:high], values[:, :, low:high], scale, added)

    if bias is None and _flash_cuda_serves(query):
        # One call knows the window. Its queries must see a key, which those that are sinks do not.
        first = min(T, max(0, band.sinks - band.start))
        low, high = band.run(first, T)
        read = [read_run(0, first)] if first else []
        if first < T:
            parts = query[:, :, first:], keys[:, :, low:high], values[:, :, low:high]
            read.append(_by_flash_cuda(*parts, scale, band.window))
    else:
        read = [read_run(start, min(start + rows, T)) for start in range(0, T, rows)]
    run = (
        read[0]
        if len(read) == 1
        else (torch.cat([o for o, _ in read], 2), torch.cat([s for _, s in read], 2))
    )
    return merge([run, read_sinks(0, T)] if columns else [run])


def fused(
    query: Tensor,
    sink_query: Tensor | None,
    keys: Tensor,
    values: Tensor,
    step: Step,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    """One call of torch's scaled_dot_product_attention: one query for all keys."""
    causal = step.is_causal and bias is None
    mask = None if causal else step.mask()
    if mask is not None:
        mask = mask[:, None]
    if bias is not None:
        mask = (bias if mask is None else bias.masked_fill(~mask, -torch.inf)).to(query.dtype)
    return F.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )


Kernel = Callable[[Tensor, Tensor | None, Tensor, Tensor, Step, float, Tensor | None], Tensor]
KERNELS: dict[str, Kernel] = {"one_softmax": one_softmax, "tiles": tiles, "fused": fused}


def merge(reads: Sequence[Read]) -> Tensor:
    """One softmax over the keys of all parts, from what was read of each: [B, H, T, D].

    The out of a part weighs exp(lse) of the sum of all. A part without a visible key has lse = -inf.
    """
    if len(reads) == 1:
        return reads[0][0]
    dtype = reads[0][0].dtype
    wide = _wide(dtype)
    weights = torch.stack([lse for _, lse in reads], -1).to(wide).softmax(-1)
    out = reads[0][0].to(wide) * weights[..., :1]
    for part, (read, _) in enumerate(reads[1:], 1):
        out = torch.addcmul(out, read.to(wide), weights[..., part : part + 1])
    return out.to(dtype)


def _by_matmul(query: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor | None) -> Read:
    """Two matmuls. A query that sees no key reads 0, with lse = -inf."""
    scores = _scores(query, keys, scale)
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None].clamp(min=torch.finfo(lse.dtype).min)).exp()
    return _weighted(weights, values), lse


def _by_flash(query: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor | None) -> Read:
    """torch's fused kernel for a CPU. Each query must see a key."""
    if flash_attention_cpu is None:
        return _by_matmul(query, keys, values, scale, bias)
    # It assumes, without a check, that the numbers of one head lie next to each other.
    query, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, values))
    return flash_attention_cpu(query, keys, values, attn_mask=bias, scale=scale)  # type: ignore[no-any-return]


def _by_flash_cuda(query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int) -> Read:
    """torch's flash kernel for CUDA: consecutive queries, of which the last stands at the last key, and their band.

    Each query must see a key.
    """
    assert flash_attention_cuda is not None  # see _flash_cuda_serves
    out, lse, *_ = flash_attention_cuda(
        *(part.transpose(1, 2) for part in (query, keys, values)), None, None, query.shape[2], keys.shape[2],
        0.0, True, False, scale=scale, window_size_left=window - 1, window_size_right=0,
    )  # fmt: skip
    return out.transpose(1, 2), lse


def _flash_cuda_serves(query: Tensor) -> bool:
    """Whether `_by_flash_cuda` takes queries like these."""
    dim = query.shape[3]
    fits = query.dtype != _wide(query.dtype) and dim % 8 == 0 and dim <= 256 and not query.requires_grad
    return query.is_cuda and fits and flash_attention_cuda is not None and _has_flash(query.device)


@lru_cache(maxsize=16)
def _has_flash(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache(4)  # all layers, and nearly all tiles of a long text, have the same
def _run_bias(
    queries: int, keys: int, in_front: int, window: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """Visibility as a bias, 0 or -inf [queries, keys], for consecutive tokens; None where each query sees all.

    The first query stands behind `in_front` of the keys.
    """
    if queries == 1:
        return None
    with torch.inference_mode(False):  # or autograd could not use it
        key = torch.arange(keys, dtype=torch.int64, device=device)
        query = torch.arange(in_front, in_front + queries, dtype=torch.int64, device=device)[:, None]
        return _as_bias(is_visible(key, query, 0, window), dtype)


def _as_bias(visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if visible is None:
        return None
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def _joined_bias(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one + other


def _scores(query: Tensor, keys: Tensor, scale: float, sinks: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """scale · q·k in float32 or wider: [B, H, T, K].

    sinks: another query, and the first of the keys, which are scored by it.
    """
    if (
        query.dtype == torch.float16
    ):  # q·k may pass 65,504, the largest float16; a power of two rounds nothing
        power = 2.0 ** min(0, math.frexp(scale)[1])
        query, scale = query * power, scale / power
        sinks = None if sinks is None else (sinks[0] * power, sinks[1])
    scores = _products(query, keys)
    if sinks is not None:
        scores[..., : sinks[1].shape[2]] = _products(*sinks)
    return scores.to(_wide(scores.dtype)).mul_(scale)


def _products(query: Tensor, keys: Tensor) -> Tensor:
    """q·k, [B, H, T, K]. Queries that share a key head are rows of one matmul."""
    B, H, T, D = query.shape
    G, K = keys.shape[1], keys.shape[2]
    query = query.reshape(B, G, H // G * T, D)
    if _is_odd_size(T, K, query):
        query, keys = query.float(), keys.float()
    if T == 1 and query.dtype == torch.float32 and query.device.type == "cpu" and not IS_INTEL:
        # Keys times a few columns take up to 1.8 times less than a few rows times the keys; on Intel's
        # processors twice as long. tools/bench.py decode, AMD EPYC and Intel Xeon, 2026-11.
        return (keys @ query.transpose(2, 3)).transpose(2, 3).contiguous().view(B, H, T, K)
    return (query @ keys.transpose(2, 3)).view(B, H, T, K)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """weights [B, H, T, K] · values [B, G, K, D] -> [B, H, T, D], in the type of the values."""
    B, H, T, K = weights.shape
    G, D = values.shape[1], values.shape[3]
    weights = weights.view(B, G, H // G * T, K)
    if _is_odd_size(T, K, values):
        return (weights.float() @ values.float()).to(values.dtype).view(B, H, T, D)
    return (weights.to(values.dtype) @ values).view(B, H, T, D)


def _is_odd_size(queries: int, keys: int, x: Tensor) -> bool:
    """Whether a product in a half type has one of many sizes: then it runs in float32.

    torch calls oneDNN for half types on a CPU, which keeps 0.6 MB for each size that it meets (tools/variety.py).
    MKL, which multiplies float32, keeps nothing.
    """
    if x.device.type != "cpu" or x.dtype == _wide(x.dtype):
        return False
    return keys % EVEN_KEYS != 0 if queries == 1 else queries % EVEN_QUERIES != 0


def _tile_queries(query: Tensor) -> int:
    if query.device.type != "cpu":
        return TILE_QUERIES_ACCELERATOR
    return TILE_QUERIES_AMX if IS_INTEL and query.dtype != _wide(query.dtype) else TILE_QUERIES


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
