"""The part "tiles" of tools/gpu_check.py: which tiles are the fastest on this GPU, which are then kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from streamllm.compiled import triton_tiles, triton_tune

if TYPE_CHECKING:
    from benchmark.gpu import Log

BF16, INT8 = torch.bfloat16, torch.int8
# outputs, inputs, gated, type of the weight: queries, keys and values; output; gate and up; down; head.
PRODUCTS = (
    (6144, 4096, False, BF16), (4096, 4096, False, BF16), (14336, 4096, True, BF16), (4096, 14336, False, BF16),
    (128256, 4096, False, BF16),  # 8B
    (12288, 4096, False, BF16), (11008, 4096, True, BF16), (4096, 11008, False, BF16),  # 7B
    (3072, 2048, False, BF16), (2048, 2048, False, BF16), (8192, 2048, True, BF16), (2048, 8192, False, BF16),
    (128256, 2048, False, BF16),  # 1B
    (6144, 4096, False, INT8), (4096, 4096, False, INT8), (14336, 4096, True, INT8), (4096, 14336, False, INT8),
    (128256, 4096, False, INT8),
)  # fmt: skip
ATTENTIONS = ((8, 4, 4096, 128), (32, 1, 4096, 128), (8, 4, 1024, 64))  # G, H / G, S + W, D: 8B, 7B, 1B


def measure_tiles(log: Log, arguments: str, workers: int, spread: Callable[[Log, int], None]) -> None:
    """Workers compile all tiles side by side; then this process alone measures them."""
    if arguments:
        worker, count = map(int, arguments.split("/"))
        for work in list(compilations())[worker::count]:
            try:
                work()
            except Exception:
                continue  # it is left out when it is measured
        torch.cuda.synchronize()
        return
    spread(log, workers)
    device = torch.device("cuda", torch.cuda.current_device())
    kept: dict[str, tuple[int, ...]] = {}
    for shape in ATTENTIONS:
        log.attempt("attention tile", lambda shape=shape: attention_row(log, kept, *shape, device))
    for shape in PRODUCTS:
        log.attempt("product tile", lambda shape=shape: product_row(log, kept, *shape, device))
        triton_tiles.keep_tiles(device, kept)


def compilations() -> Iterator[Callable[[], Any]]:
    """Each launches one kernel once, on tensors that hold no meaningful numbers."""
    device = torch.device("cuda", torch.cuda.current_device())

    def product(shape: tuple[Any, ...], tile: triton_tiles.Tile) -> None:
        ours, _ = triton_tune.product_launches(*shape, device, copies=1)
        next(ours(tile))

    def attention(shape: tuple[int, ...], tile: triton_tiles.AttentionTile) -> None:
        next(triton_tune.attention_launches(*shape, BF16, device, layers=1)(tile))

    for shape in ATTENTIONS:
        for tile in triton_tune.attention_tiles(default_attention(*shape, device), shape[1]):
            yield lambda shape=shape, tile=tile: attention(shape, tile)
    for shape in PRODUCTS:
        for tile in triton_tune.product_tiles(*shape[:3]):
            yield lambda shape=shape, tile=tile: product(shape, tile)


def default_attention(heads: int, shared: int, slots: int, dim: int, device: torch.device) -> Any:
    return triton_tiles.attention_tile(heads, shared, slots, dim, BF16, device)


def product_row(
    log: Log,
    kept: dict[str, tuple[int, ...]],
    outputs: int,
    inputs: int,
    gated: bool,
    dtype: torch.dtype,
    device: Any,
) -> None:
    ours, cublas = triton_tune.product_launches(outputs, inputs, gated, dtype, device)
    default = triton_tiles.tile_of(1, torch.empty(outputs, inputs, dtype=dtype, device=device), gated)
    measured = lambda tile: triton_tune.microseconds(lambda: ours(tile))  # noqa: E731
    before = measured(default)
    us, tile = triton_tune.best_tile(triton_tune.product_tiles(outputs, inputs, gated), measured)
    kept[triton_tiles.product_key(outputs, inputs, gated, dtype.itemsize)] = tuple(tile)
    nbytes = outputs * inputs * dtype.itemsize * (2 if gated else 1)
    log.add(product=f"{outputs} x {inputs}{' gated' if gated else ''}, {dtype}", tile=str(tuple(tile)), us=us,
            tb_per_s=nbytes / us / 1e6, cublas_us=triton_tune.microseconds(cublas) if dtype != INT8 else 0.0,
            default_us=before)  # fmt: skip


def attention_row(
    log: Log, kept: dict[str, tuple[int, ...]], heads: int, shared: int, slots: int, dim: int, device: Any
) -> None:
    ours = triton_tune.attention_launches(heads, shared, slots, dim, BF16, device)
    default = default_attention(heads, shared, slots, dim, device)
    measured = lambda tile: triton_tune.microseconds(lambda: ours(tile))  # noqa: E731
    before = measured(default)
    us, tile = triton_tune.best_tile(triton_tune.attention_tiles(default, shared), measured)
    kept[triton_tiles.attention_key(heads, shared, slots, dim, 2)] = tuple(tile)
    log.add(product=f"attention, {heads} x {shared} heads of {dim}, {slots} slots", tile=str(tuple(tile)), us=us,
            tb_per_s=2 * heads * slots * dim * 2 / us / 1e6, cublas_us=0.0, default_us=before)  # fmt: skip
