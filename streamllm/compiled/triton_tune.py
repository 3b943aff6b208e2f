"""Measures tiles of the Triton kernels on the GPU at hand. `triton_tiles.keep_tiles` keeps the best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product as every
from typing import Any

import torch

from streamllm.compiled import triton_kernels as kernels
from streamllm.compiled import triton_launch as launch
from streamllm.compiled.triton_tiles import AttentionTile, Tile

BYTES_PER_ROUND = 1 << 29  # far more than any cache holds, so that each product reads from memory
MAX_TILE_NUMBERS = 8192  # of a tile's float32 sums; a gated product keeps twice as many


def product_tiles(outputs: int, inputs: int, gated: bool) -> list[Tile]:
    """The tiles worth a measurement for one row: wide enough that each thread loads 16 bytes, without spills."""
    tiles = []
    for rows, columns, warps in every((1, 2, 4, 8), (256, 512, 1024, 2048), (4, 8)):
        numbers = rows * columns
        fits = warps * 256 <= numbers <= MAX_TILE_NUMBERS // (2 if gated else 1)
        if rows == 1 and columns < 2048:
            continue
        if fits and columns < 2 * inputs and (inputs % columns == 0 or columns >= 1024):
            tiles.append(Tile(rows, columns, warps))
    return tiles


def attention_tiles(default: AttentionTile, shared: int) -> list[AttentionTile]:
    """The tiles worth a measurement, around the rule's."""
    splits = {max(1, default.splits // 2), default.splits, min(64, default.splits * 2)}
    blocks, warps = (
        ((64, 128), ((4, 2), (4, 3), (8, 2))) if shared > 1 else ((32, 64), ((4, 2), (4, 3), (8, 3)))
    )
    if shared == 1:
        splits.add(min(64, default.splits * 4))
    return [
        AttentionTile(split, block, warp, stages)
        for split, block, (warp, stages) in every(sorted(splits), blocks, warps)
    ]


def product_launches(
    outputs: int,
    inputs: int,
    gated: bool,
    dtype: torch.dtype,
    device: torch.device,
    copies: int | None = None,
) -> tuple[Callable[[Tile], Iterator[Any]], Callable[[], Iterator[Any]]]:
    """Launches products of one row with each of some weights in turn: ours with a tile, and cuBLAS's.

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
    x, weight = (torch.randn(1, 1, inputs, dtype=kind, device=device) for _ in range(2))
    scale = torch.ones(outputs, dtype=kind, device=device) if dtype == torch.int8 else None
    residual = torch.randn(1, 1, outputs, dtype=kind, device=device)
    widens = outputs > inputs or gated
    norm = (kernels.RMS_NORM, weight.view(-1), None, 1e-5) if widens else None
    out = torch.empty_like(residual)

    def ours(tile: Tile) -> Iterator[Any]:
        for one in weights:
            up = one[outputs:] if gated else one
            launch.launch_product(
                tile, x, one[:outputs], scale, None, norm, (up, scale, None), gated,
                None if widens else residual, int(gated), out, 1, outputs, inputs,
            )  # fmt: skip
            yield

    def cublas() -> Iterator[Any]:
        for one in weights:
            torch.nn.functional.linear(x, one.to(kind) if dtype == torch.int8 else one)
            yield None

    return ours, cublas


def attention_launches(
    heads: int, shared: int, slots: int, dim: int, dtype: torch.dtype, device: torch.device, layers: int = 16
) -> Callable[[AttentionTile], Iterator[Any]]:
    """Launches attention of one token over a full ring of each of some layers in turn."""
    rings = [
        [torch.randn(1, heads, slots, dim, dtype=dtype, device=device) for _ in range(2)]
        for _ in range(layers)
    ]
    q = torch.randn(1, 1, heads * shared * dim, dtype=dtype, device=device)
    k = torch.randn(1, 1, heads * dim, dtype=dtype, device=device)
    places = torch.full((1,), 10 * slots, dtype=torch.int64, device=device)
    starts = torch.full((1,), min(4, slots - 1), dtype=torch.int64, device=device)
    table = torch.ones(1, dim, dtype=torch.float32, device=device)

    def ours(tile: AttentionTile) -> Iterator[Any]:
        counters = torch.zeros(layers, heads, dtype=torch.int32, device=device)
        for ring, arrived in zip(rings, counters, strict=True):
            yield launch.attended(
                q,
                k,
                k,
                ring,
                places,
                starts,
                arrived,
                [table] * 6,
                None,
                None,
                dim,
                min(4, slots - 1),
                0.1,
                None,
                tile,
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


def best_tile(tiles: Sequence[Any], measure: Callable[[Any], float]) -> tuple[float, Any]:
    """The fastest of the tiles, with its time. A tile that does not fit the GPU is left out."""
    found = []
    for tile in tiles:
        try:
            found.append((measure(tile), tile))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # such as too much shared memory
            continue
    return min(found)
