"""The limit: a plain read of the bytes that one token needs."""

from __future__ import annotations

import time
from typing import Any

from benchmark.spec import SINKS, SIZES, Round, Spec, synchronize


def limit(spec: Spec) -> Round:
    """Reads as many bytes as the weights and the cache have, by the fastest of four reductions."""
    import torch

    cache_bytes = getattr(torch, spec.computes_in).itemsize
    layers, head, numbers_per_token = _numbers_read(spec)
    # An int4 weight has a scale and an offset for each 32 inputs; the head is int8.
    layer_bytes, head_bytes = {"int8": (1, 1), "int4": (0.625, 1)}.get(spec.dtype, (cache_bytes, cache_bytes))
    nbytes = int(layers * layer_bytes + head * head_bytes)
    nbytes += spec.batch * numbers_per_token * (SINKS + spec.window) * cache_bytes
    pieces = SIZES[spec.model]["layers"] + 1  # one for each layer and one for the head
    # torch.ones writes every page. Pages of zeros that were never written have no memory behind them.
    parts = [torch.ones(nbytes // pieces // 8, dtype=torch.int64, device=spec.device) for _ in range(pieces)]
    readers = [
        lambda part: part.view(torch.float32).sum(),
        lambda part: part.sum(),
        lambda part: part.view(torch.int32).max(),
        lambda part: torch.dot(
            part.view(torch.float32)[: part.numel()], part.view(torch.float32)[part.numel() :]
        ),
    ]

    def read_all(reader: Any, times: int) -> None:
        for _ in range(times):
            for part in parts:
                reader(part)
        synchronize(spec)  # once: an accelerator queues the reads

    def seconds(reader: Any) -> float:
        begin = time.perf_counter()
        read_all(reader, 1)
        return time.perf_counter() - begin

    fastest = min(readers, key=lambda reader: min(seconds(reader) for _ in range(5)))
    return lambda: read_all(fastest, spec.tokens)


def _numbers_read(spec: Spec) -> tuple[int, int, int]:
    """Numbers read for one token: weights of the layers and of the head, and the cache's for each cached token."""
    size = SIZES[spec.model]
    C, head = size["width"], size["width"] // size["heads"]
    attention = C * C * 2 + C * size["kv_heads"] * head * 2
    weights = size["layers"] * (attention + 3 * C * size["mlp_width"])
    return weights, C * size["vocab_size"], size["layers"] * size["kv_heads"] * head * 2
