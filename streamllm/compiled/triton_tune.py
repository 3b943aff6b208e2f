"""Measures tiles of the Triton kernels on this GPU. `triton_tiles.keep_tiles` keeps the best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product as every
from typing import Any

import torch

from streamllm.compiled import triton_kernels as kernels
from streamllm.compiled import triton_launch as launch
from streamllm.compiled.triton_tiles import NARROW, AttentionTile, Tile

BYTES_PER_ROUND = 1 << 29  # far more than any cache holds, so that each product reads from memory
# Rows, columns and warps of a tile that was the fastest, or next to it, for some shape on an H200.
SHAPES = {
    2: ((1, 2048, 8), (2, 2048, 8), (4, 2048, 8), (1, 512, 2), (2, 512, 4), (1, 1024, 2), (2, 1024, 2), (2, 1024, 4),
        (4, 1024, 4), (2, 2048, 4), (4, 2048, 4), (8, 512, 8), (8, 1024, 8)),
    1: ((4, 512, 2), (8, 512, 2), (16, 512, 2), (8, 512, 4), (4, 1024, 2), (8, 1024, 4), (16, 1024, 4), (4, 2048, 4),
        (8, 2048, 8)),
}  # fmt: skip
MAX_NUMBERS = 64  # of a weight in flight, per thread and round: more would not fit its registers


def product_tiles(outputs: int, inputs: int, gated: bool, itemsize: int) -> list[Tile]:
    """The tiles worth a measurement for one row. A measurement of one product alone cannot tell `ahead` in a step of a
    wide model: there it costs more than it brings.
    """
    tiles = []
    for rows, columns, warps in SHAPES[1 if itemsize == 1 else 2]:
        numbers = rows * columns // (warps * 32)  # per thread
        fits = numbers <= MAX_NUMBERS // (2 if gated else 1) and columns < 2 * inputs
        if fits and (inputs % columns == 0 or columns >= 1024):
            aheads = (0, 1) if min(outputs, inputs) <= NARROW else (0,)
            folds = (1, 16 // itemsize)
            tiles += [Tile(rows, columns, warps, ahead=a, fold=fold) for a, fold in every(aheads, folds)]
    return tiles


def rows_tiles(rows: int) -> list[Tile]:
    """The tiles worth a measurement for 2 to 16 rows."""
    return [
        Tile(outputs, inputs, 4, stages, max(16, rows))
        for outputs, inputs, stages in every((16, 32, 64), (128, 256), (3, 5))
    ]


def attention_tiles(pairs: int, shared: int, slots: int, processors: int) -> list[AttentionTile]:
    """The tiles worth a measurement: between half a program and sixteen for each multiprocessor."""
    splits = [
        split for split in (1, 2, 4, 8, 16, 32, 64) if processors // 2 <= pairs * split <= processors * 16
    ]
    if pairs > processors * 4:
        splits = [1, 2, 4]
    blocks = (64, 128) if shared > 1 else (32, 64)
    return [
        AttentionTile(split, block, warp, stages)
        for split, block, (warp, stages) in every(splits, blocks, ((2, 3), (4, 2), (4, 3), (4, 4), (8, 3)))
        if split * block <= slots
    ]


def product_launches(
    outputs: int,
    inputs: int,
    gated: bool,
    dtype: torch.dtype,
    device: torch.device,
    copies: int | None = None,
    rows: int = 1,
) -> tuple[Callable[[Tile], Iterator[Any]], Callable[[], Iterator[Any]]]:
    """Launches products of some rows with each of some weights in turn: ours with a tile, and cuBLAS's.

    A product that widens has an RMS norm before it, another adds a residual, as in Llama.
    """
    numbers = outputs * inputs * (2 if gated else 1)
    itemsize = dtype.itemsize
    copies = copies or max(2, BYTES_PER_ROUND // (numbers * itemsize))
    kind = torch.bfloat16 if dtype == torch.int8 else dtype
    weights = []
    for _ in range(copies):
        if dtype == torch.int8:
            weights.append(torch.randint(-127, 128, (numbers // inputs, inputs), dtype=dtype, device=device))
        else:
            weights.append(torch.randn(numbers // inputs, inputs, dtype=dtype, device=device))
    x, weight = (torch.randn(count, 1, inputs, dtype=kind, device=device) for count in (rows, 1))
    scale = torch.ones(outputs, dtype=kind, device=device) if dtype == torch.int8 else None
    residual = torch.randn(rows, 1, outputs, dtype=kind, device=device)
    widens = outputs > inputs or gated
    norm = (kernels.RMS_NORM, weight.view(-1), None, 1e-5) if widens and rows == 1 else None
    out = torch.empty_like(residual)

    def ours(tile: Tile) -> Iterator[Any]:
        for one in weights:
            up = one[outputs:] if gated else one
            launch.launch_product(
                tile, x, one[:outputs], scale, None, norm, (up, scale, None), gated,
                None if widens else residual, int(gated), out, rows, outputs, inputs,
            )  # fmt: skip
            yield

    def cublas() -> Iterator[Any]:
        for one in weights:
            torch.nn.functional.linear(x, one.to(kind) if dtype == torch.int8 else one)
            yield None

    return ours, cublas


def attention_launches(
    batch: int,
    heads: int,
    shared: int,
    slots: int,
    dim: int,
    int8: bool,
    device: torch.device,
    layers: int | None = None,
) -> Callable[[AttentionTile], Iterator[Any]]:
    """Launches attention of one token in bfloat16 over a full ring of each of some layers in turn."""
    dtype, sinks = torch.bfloat16, 4
    layers = layers or max(2, BYTES_PER_ROUND // (2 * batch * heads * slots * dim * (1 if int8 else 2)))
    rings: list[list[torch.Tensor]] = []
    for _ in range(layers):
        if int8:
            numbers = torch.randint(
                -127, 128, (2, batch, heads, slots - sinks, dim), dtype=torch.int8, device=device
            )
            scales = torch.full((2, batch, heads, slots - sinks, 1), 0.02, dtype=dtype, device=device)
            rings.append(
                [torch.randn(2, batch, heads, sinks, dim, dtype=dtype, device=device), scales, numbers]
            )
        else:
            shape = batch, heads, slots, dim
            rings.append([torch.randn(shape, dtype=dtype, device=device) for _ in range(2)])
    q = torch.randn(batch, 1, heads * shared * dim, dtype=dtype, device=device)
    k = torch.randn(batch, 1, heads * dim, dtype=dtype, device=device)
    places = torch.full((1,), 10 * slots, dtype=torch.int64, device=device)
    starts = torch.full((batch,), sinks, dtype=torch.int64, device=device)
    table = torch.ones(1, dim, dtype=torch.float32, device=device)

    def ours(tile: AttentionTile) -> Iterator[Any]:
        counters = torch.zeros(layers, batch * heads, dtype=torch.int32, device=device)
        for ring, arrived in zip(rings, counters, strict=True):
            tables = [table] * 6
            yield launch.attended(
                q, k, k, ring, places, starts, arrived, tables, None, None, dim, sinks, 0.1, None, tile
            )

    return ours


def microseconds(launches: Callable[[], Iterator[Any]], repeats: int = 3, rounds: int = 3) -> float:
    """Device time of one launch, as a part of a CUDA graph: the median of `rounds`."""
    for _ in launches():  # compiles
        pass
    torch.cuda.synchronize()
    graph, count = torch.cuda.CUDAGraph(), 0
    with torch.cuda.graph(graph):
        for _ in launches():
            count += 1
    graph.replay()
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / repeats / count)
    return sorted(times)[len(times) // 2]


def by_time(tiles: Sequence[Any], measure: Callable[[Any], float]) -> list[tuple[float, Any]]:
    """The tiles with their times, the fastest first. A tile that does not fit the GPU is left out."""
    found = []
    for tile in tiles:
        try:
            found.append((measure(tile), tile))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # such as too much shared memory
            continue
    return sorted(found)
