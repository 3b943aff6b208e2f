"""Tile sizes of the Triton kernels: by measurements on a GPU where there are some, else by a rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_MATVEC_ROWS = 16  # up to this many rows, a product reads its weights by our kernels; above, by cuBLAS
INTERPRETED_SPLITS = 3


class Tile(NamedTuple):
    """What one program of a product computes."""

    outputs: int
    inputs: int  # per round of its loop
    warps: int
    stages: int = 3
    rows: int = 16  # not for one row


INTERPRETED_TILE = Tile(64, 32, 4)  # a program costs milliseconds there

# (outputs, inputs, gated) of a bfloat16 or float16 product with one row: the fastest tile on an H200 (torch 2.11,
# triton 3.6), measured with a prototype of this kernel.
TILES = {
    (6144, 4096, False): Tile(2, 2048, 8),
    (4096, 4096, False): Tile(2, 2048, 4),
    (14336, 4096, True): Tile(2, 1024, 4),
    (4096, 14336, False): Tile(8, 512, 8),
    (128256, 4096, False): Tile(2, 2048, 8),
}


def tile_of(rows: int, weight: Tensor, gated: bool, normed: bool) -> Tile:
    """The tile of a product of `rows` rows with a weight [N, K]."""
    outputs, inputs = weight.shape
    if weight.device.type != "cuda":
        return INTERPRETED_TILE
    if rows > 1:
        return _rule_for_rows(rows, outputs, inputs, weight.itemsize)
    if weight.itemsize == 2 and (outputs, inputs, gated) in TILES:
        return TILES[outputs, inputs, gated]
    return _rule_for_one_row(outputs, inputs, gated, weight.itemsize)


def _rule_for_one_row(outputs: int, inputs: int, gated: bool, itemsize: int) -> Tile:
    most = max(32, min(1 << (inputs - 1).bit_length(), 4096 // itemsize if not gated else 2048 // itemsize * 1))
    for columns in (2048, 1024, 512, 256):
        if columns <= most and inputs % columns == 0:
            break
    else:
        columns = most  # the last round is masked
    return Tile(2 if outputs >= 1024 else 1, columns, 8 if columns >= 2048 else 4)


def _rule_for_rows(rows: int, outputs: int, inputs: int, itemsize: int) -> Tile:
    return Tile(16, max(16, min(256 // itemsize, 1 << (inputs - 1).bit_length())), 4, 3, 16 if rows <= 16 else 32)


def attention_block(slots: int, dim: int, dtype: torch.dtype) -> int:
    """Slots per round of the attention kernel's loop."""
    block = 64 if dtype.itemsize == 2 and dim <= 128 else 32
    return max(16, min(block, 1 << (slots - 1).bit_length()))


def attention_splits(pairs: int, slots: int, dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """Into how many parts the slots of each of B · G heads are divided: two programs for each multiprocessor."""
    blocks = -(-slots // attention_block(slots, dim, dtype))
    if device.type != "cuda":
        return min(INTERPRETED_SPLITS, blocks)
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count // max(pairs, 1)
    return max(1, min(1 << max(wanted, 1).bit_length() - 1, 64, blocks))
