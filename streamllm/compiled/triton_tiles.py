"""Tile sizes of the Triton kernels: the best ones measured on this GPU, if kept; else a table's; else a rule's.

`triton_tune.py` measures, and keeps the result for later processes beside compiled libraries (`library.folder`).
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from streamllm.compiled import library

MAX_MATVEC_ROWS = 16  # up to this many rows, our kernels compute a product; above, cuBLAS
INTERPRETED_SPLITS = 3
# When a kernel lets the next one start: before its loop, or after it. On an H200 (2026-11, tools/gpu_check.py --parts
# decode-8b decode-1b), 8B is 1.08 times as fast with the second, and 1B 1.06 times as fast with the first.
FROM_THE_START, AT_THE_END = 1, 2
NARROW = 2048


class Tile(NamedTuple):
    """What one program of a product computes."""

    outputs: int
    inputs: int  # per round of its loop
    warps: int
    stages: int = 3
    rows: int = 16  # for several rows
    ahead: int = 0  # for one row: tiles that are loaded before the previous kernel has ended, 0 or 1
    fold: int = 1  # for one row: adjacent products that share a sum


class AttentionTile(NamedTuple):
    """How attention is divided."""

    splits: int  # parts of the slots of a key head
    block: int  # slots per round of the loop
    warps: int
    stages: int


# Triton's interpreter takes milliseconds for a program, so its tiles are large.
INTERPRETED_TILES = {1: Tile(64, 32, 4, fold=4), 2: Tile(64, 32, 4, ahead=1), 4: Tile(64, 32, 4, ahead=1)}
# By outputs, inputs, gated and bytes of a weight, for a product with one row: the fastest tile on an H200 (torch 2.11,
# triton 3.6), 2026-11. tools/gpu_check.py --parts tiles measures them again.
TILES = {
    (6144, 4096, False, 2): Tile(2, 2048, 8),
    (4096, 4096, False, 2): Tile(4, 2048, 8, ahead=1),
    (14336, 4096, True, 2): Tile(1, 2048, 8),
    (4096, 14336, False, 2): Tile(8, 512, 8, ahead=1),
    (128256, 4096, False, 2): Tile(4, 1024, 4),
    (12288, 4096, False, 2): Tile(4, 2048, 8, fold=8),
    (11008, 4096, True, 2): Tile(1, 2048, 8),
    (4096, 11008, False, 2): Tile(2, 1024, 4, fold=8),
    (3072, 2048, False, 2): Tile(2, 1024, 2, ahead=1, fold=8),
    (2048, 2048, False, 2): Tile(2, 1024, 4, ahead=1, fold=8),
    (8192, 2048, True, 2): Tile(2, 1024, 4, ahead=1, fold=8),
    (2048, 8192, False, 2): Tile(4, 2048, 8, ahead=1, fold=8),
    (128256, 2048, False, 2): Tile(4, 2048, 4),
    (6144, 4096, False, 1): Tile(8, 1024, 4, fold=16),
    (4096, 4096, False, 1): Tile(8, 2048, 8, fold=16),
    (14336, 4096, True, 1): Tile(8, 512, 4, fold=16),
    (4096, 14336, False, 1): Tile(8, 2048, 8, fold=16),
    (128256, 4096, False, 1): Tile(8, 512, 2, fold=16),
}
# By pairs, query heads of a key head, slots, head dimension and bytes of a number in the cache, from the same runs.
ATTENTION_TILES = {
    (64, 4, 4096, 128, 2): AttentionTile(2, 128, 8, 3),
    (512, 4, 1024, 128, 2): AttentionTile(1, 64, 4, 2),
    (8, 4, 4096, 128, 1): AttentionTile(32, 64, 4, 2),
    (512, 4, 1024, 128, 1): AttentionTile(1, 64, 2, 3),
}


def on_gpu(device: torch.device) -> bool:
    """Whether kernels are compiled for a GPU, not interpreted."""
    return device.type == "cuda"


@lru_cache(maxsize=16)
def starts_early(device: torch.device) -> bool:
    """Whether a kernel may be launched before the previous one has ended: programmatic dependent launch."""
    return on_gpu(device) and torch.cuda.get_device_capability(device) >= (9, 0)


def multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def product_key(outputs: int, inputs: int, gated: bool, itemsize: int) -> str:
    return f"product {outputs} x {inputs}{' gated' if gated else ''}, {itemsize} bytes"


def rows_key(outputs: int, inputs: int, gated: bool, itemsize: int) -> str:
    return f"{product_key(outputs, inputs, gated, itemsize)}, 2 to {MAX_MATVEC_ROWS} rows"


def attention_key(pairs: int, shared: int, slots: int, dim: int, itemsize: int) -> str:
    """itemsize: bytes of a number in the cache."""
    return f"attention {pairs} x {shared} heads, {slots} slots of {dim}, {itemsize} bytes"


def tile_of(rows: int, weight: Tensor, gated: bool) -> Tile:
    """The tile of a product of `rows` rows with a weight [N, K]."""
    outputs, inputs = weight.shape
    if not on_gpu(weight.device):
        return INTERPRETED_TILES[weight.itemsize]
    if weight.dtype == torch.uint8:
        return _int4_tile(rows, outputs, inputs, gated)
    if 1 < rows <= MAX_MATVEC_ROWS:
        kept = kept_tiles(_name(weight.device)).get(rows_key(outputs, inputs, gated, weight.itemsize))
        if kept is not None:
            return Tile(*kept)
    if rows > 1:
        columns = max(16, min(64 if weight.itemsize > 2 else 128, _power_of_two(inputs)))
        many = max(16, min(64, _power_of_two_below(outputs // 64)))
        return Tile(many, columns, 4, 3 if gated else 5, 16 if rows <= 16 else 32)
    kept = kept_tiles(_name(weight.device)).get(product_key(outputs, inputs, gated, weight.itemsize))
    if kept is not None:
        return Tile(*kept)
    return TILES.get((outputs, inputs, gated, weight.itemsize)) or _rule(
        outputs, inputs, gated, weight.itemsize
    )


def _int4_tile(rows: int, outputs: int, inputs: int, gated: bool) -> Tile:
    """inputs: bytes of a row. Not measured on a GPU."""
    if rows > 1:
        return Tile(16, max(16, min(256, _power_of_two(inputs))), 4, 4, 16 if rows <= 16 else 32)
    most = min(1024 if gated else 2048, _power_of_two(inputs))
    columns = next((size for size in (2048, 1024, 512, 256) if size <= most and inputs % size == 0), most)
    return Tile(2 if outputs >= 1024 else 1, columns, 8 if columns >= 2048 else 4)


def _rule(outputs: int, inputs: int, gated: bool, itemsize: int) -> Tile:
    """Few outputs per program, so that each thread loads its part of x once and uses it for all of them."""
    columns = min(512 if gated else 1024, _power_of_two(inputs))
    rows = min(8 if itemsize == 1 else 4 if itemsize == 2 else 2, _power_of_two(outputs))
    fold = 16 // itemsize if columns >= 512 else 1
    return Tile(rows, columns, 4, ahead=int(min(outputs, inputs) <= NARROW and itemsize > 1), fold=fold)


def attention_tile(
    pairs: int,
    shared: int,
    slots: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    int8: bool = False,
) -> AttentionTile:
    """For B · G pairs, `shared` query heads each, and a cache in `dtype` or int8.

    The rule gives each multiprocessor about one program; four where the kernel does not use matrix units.
    """
    itemsize = 1 if int8 else dtype.itemsize
    small = shared == 1 or dtype.itemsize > 2 or dim > 128
    block = 32 if small else 64
    block = max(16, min(block, _power_of_two(slots)))
    blocks = -(-slots // block)
    if not on_gpu(device):
        return AttentionTile(min(INTERPRETED_SPLITS, blocks), block, 4, 2)
    kept = kept_tiles(_name(device)).get(attention_key(pairs, shared, slots, dim, itemsize))
    if kept is not None:
        return AttentionTile(*kept)
    found = ATTENTION_TILES.get((pairs, shared, slots, dim, itemsize))
    if found is not None:
        return found
    splits = _power_of_two_below((4 if shared == 1 else 1) * multiprocessors(device) // pairs)
    stages = 3 if dtype.itemsize == 2 and dim <= 128 else 2
    return AttentionTile(min(64, splits, _power_of_two_below(blocks)), block, 4, stages)


@lru_cache(maxsize=8)
def kept_tiles(name: str) -> dict[str, list[int]]:
    """The tiles that were measured on GPUs of this name."""
    try:
        kept = json.loads((library.folder() / f"tiles-{name}.json").read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def keep_tiles(device: torch.device, tiles: dict[str, tuple[int, ...]]) -> None:
    """Keep measured tiles for later processes. A full or read-only disk is no error."""
    name = _name(device)
    kept = {**kept_tiles(name), **{key: list(tile) for key, tile in tiles.items()}}
    try:
        library.folder().mkdir(parents=True, exist_ok=True)
        path = library.folder() / f"tiles-{name}.json"
        path.with_suffix(".new").write_text(json.dumps(kept, indent=1))
        path.with_suffix(".new").replace(path)
    except OSError:
        pass
    kept_tiles.cache_clear()


def _name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()


def _power_of_two_below(number: int) -> int:
    """The largest power of two that is at most `number`, and at least 1."""
    return 1 << max(number, 1).bit_length() - 1
