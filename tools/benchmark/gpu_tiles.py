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
# Products of 8 rows: 8B.
ROWS = 8
PRODUCTS_OF_ROWS = PRODUCTS[:5]
# B, G, H / G, S + W, D, int8: 8B, 7B, 1B; 8B with several rows.
ATTENTIONS = (
    (1, 8, 4, 4096, 128, False), (1, 32, 1, 4096, 128, False), (1, 8, 4, 1024, 64, False), (64, 8, 4, 1024, 128, False),
    (256, 8, 4, 1024, 128, False), (32, 8, 4, 4096, 128, False), (8, 8, 4, 4096, 128, False),
    (1, 8, 4, 4096, 128, True), (64, 8, 4, 1024, 128, True), (256, 8, 4, 1024, 128, True),
)  # fmt: skip
SHOWN = 4  # of the fastest tiles


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
        torch.cuda.empty_cache()
    for shape, rows in [*((shape, 1) for shape in PRODUCTS), *((shape, ROWS) for shape in PRODUCTS_OF_ROWS)]:
        log.attempt(
            "product tile", lambda shape=shape, rows=rows: product_row(log, kept, *shape, rows, device)
        )
        torch.cuda.empty_cache()
    triton_tiles.keep_tiles(device, kept)


def compilations() -> Iterator[Callable[[], Any]]:
    """Each launches one kernel once, on tensors that hold no meaningful numbers."""
    device = torch.device("cuda", torch.cuda.current_device())

    def product(shape: tuple[Any, ...], rows: int, tile: triton_tiles.Tile) -> None:
        ours, _ = triton_tune.product_launches(*shape, device, copies=1, rows=rows)
        next(ours(tile))

    def attention(shape: tuple[Any, ...], tile: triton_tiles.AttentionTile) -> None:
        next(triton_tune.attention_launches(*shape, device, layers=1)(tile))

    seen = set()
    for shape in ATTENTIONS:
        for tile in tiles_of_attention(shape, device):
            key = shape[1:], tile  # one kernel serves every batch
            if key not in seen:
                seen.add(key)
                yield lambda shape=shape, tile=tile: attention((1, *shape[1:]), tile)
    for shape in PRODUCTS:
        for tile in triton_tune.product_tiles(*shape[:3], shape[3].itemsize):
            yield lambda shape=shape, tile=tile: product(shape, 1, tile)
    for shape in PRODUCTS_OF_ROWS:
        for tile in triton_tune.rows_tiles(ROWS):
            yield lambda shape=shape, tile=tile: product(shape, ROWS, tile)


def tiles_of_attention(shape: tuple[Any, ...], device: torch.device) -> list[triton_tiles.AttentionTile]:
    batch, heads, shared, slots = shape[:4]
    return triton_tune.attention_tiles(batch * heads, shared, slots, triton_tiles.multiprocessors(device))


def product_row(
    log: Log,
    kept: dict[str, tuple[int, ...]],
    outputs: int,
    inputs: int,
    gated: bool,
    dtype: torch.dtype,
    rows: int,
    device: torch.device,
) -> None:
    ours, cublas = triton_tune.product_launches(outputs, inputs, gated, dtype, device, rows=rows)
    default = triton_tiles.tile_of(rows, torch.empty(outputs, inputs, dtype=dtype, device=device), gated)
    itemsize, arguments = dtype.itemsize, (outputs, inputs, gated)
    if rows == 1:
        key, tiles = (
            triton_tiles.product_key(*arguments, itemsize),
            triton_tune.product_tiles(*arguments, itemsize),
        )
    else:
        key, tiles = triton_tiles.rows_key(*arguments, itemsize), triton_tune.rows_tiles(rows)
    nbytes = outputs * inputs * itemsize * (2 if gated else 1)
    name = f"{outputs} x {inputs}{' gated' if gated else ''}, {dtype}, {rows} rows"
    add(log, kept, key, name, nbytes, tiles, default, ours, None if dtype == INT8 else cublas)


def attention_row(
    log: Log, kept: dict[str, tuple[int, ...]], batch: int, heads: int, shared: int, slots: int, dim: int, int8: bool,
    device: torch.device,
) -> None:  # fmt: skip
    shape, pairs = (batch, heads, shared, slots, dim, int8), batch * heads
    ours = triton_tune.attention_launches(*shape, device)
    default = triton_tiles.attention_tile(pairs, shared, slots, dim, BF16, device, int8)
    itemsize = 1 if int8 else 2
    key = triton_tiles.attention_key(pairs, shared, slots, dim, itemsize)
    name = f"attention, {pairs} x {shared} heads of {dim}, {slots} slots{', int8' if int8 else ''}"
    nbytes = 2 * pairs * slots * dim * itemsize
    add(log, kept, key, name, nbytes, tiles_of_attention(shape, device), default, ours, None)


def add(
    log: Log, kept: dict[str, tuple[int, ...]], key: str, name: str, nbytes: int, tiles: list[Any], default: Any,
    ours: Callable[[Any], Iterator[Any]], cublas: Callable[[], Iterator[Any]] | None,
) -> None:  # fmt: skip
    """Measure one shape, keep its best tile, and write a row."""
    measured = lambda tile: triton_tune.microseconds(lambda: ours(tile))  # noqa: E731
    found = triton_tune.by_time([*tiles, default], measured)
    us, tile = found[0]
    kept[key] = tuple(tile)
    log.add(
        product=name, tile=str(tuple(tile)), us=us, tb_per_s=nbytes / us / 1e6,
        cublas_us=0.0 if cublas is None else triton_tune.microseconds(cublas),
        default_us=next((us for us, tile in found if tile == default), 0.0),
        next=[(round(us, 1), tuple(tile)) for us, tile in found[1:SHOWN]], worst=found[-1][0], tried=len(found),
    )  # fmt: skip
