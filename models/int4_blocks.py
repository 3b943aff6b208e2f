"""The layout of int4 weights that torch's kernel for a CPU reads: conversion from numbers, and back.

torch's converter divides the outputs into blocks. A block stores, input by input, the numbers of all its outputs, in an
order that depends on the processor. torch has no function that converts back. So this module finds the order out: it
converts a small weight whose numbers tell which output they belong to.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from streamllm.models.torch_private import int4_convert, int4_matmul

OUTPUT_MULTIPLE = 16  # torch's kernel takes a multiple of this many outputs
CHUNK_OUTPUTS = (
    64  # the largest block on any processor, so that a chunk of this many outputs has whole blocks
)
CONVERTED_OUTPUTS = 4096  # converted at a time, because torch's converter needs them in int32


def are_readable(outputs: int) -> bool:
    """Whether torch has the kernel, the kernel takes this many outputs, and the order could be found out."""
    return int4_matmul is not None and outputs % OUTPUT_MULTIPLE == 0 and _block_outputs() > 0


def to_blocks(numbers: Tensor) -> Tensor:
    """Numbers 0 … 15, uint8 [out, in] -> uint8 [out, in / 2]."""
    return torch.cat([_convert(part) for part in torch.split(numbers, CONVERTED_OUTPUTS)])


def from_blocks(blocks: Tensor) -> Tensor:
    """uint8 [out, in / 2] -> numbers 0 … 15, uint8 [out, in]."""
    outputs, inputs = blocks.shape[0], 2 * blocks.shape[1]
    size = _block_outputs()
    whole = outputs // size * size
    parts = [_unordered(blocks[:whole].reshape(-1, inputs, size // 2))] if whole else []
    if whole < outputs:
        parts.append(_unordered(blocks[whole:].reshape(1, inputs, (outputs - whole) // 2)))
    return torch.cat(parts)


def _unordered(blocks: Tensor) -> Tensor:
    """[blocks, in, outputs of a block / 2] -> numbers [out, in]."""
    order = _order(2 * blocks.shape[2]).argsort()
    numbers = torch.stack((blocks & 15, blocks >> 4), -1).flatten(2)  # [blocks, in, outputs of a block]
    return numbers[:, :, order].transpose(1, 2).reshape(-1, blocks.shape[1])


def _convert(numbers: Tensor) -> Tensor:
    assert int4_convert is not None
    converted: Tensor = int4_convert(numbers.to(torch.int32), 1)
    return converted.view(numbers.shape[0], -1)


@lru_cache(maxsize=1)
def _block_outputs() -> int:
    """How many outputs a block has: the fewest that can be converted apart from the others. 0 where none can."""
    if int4_convert is None:
        return 0
    generator = torch.Generator("cpu").manual_seed(0)
    probe = torch.randint(16, (2 * CHUNK_OUTPUTS, 4), generator=generator, dtype=torch.uint8, device="cpu")
    whole = _convert(probe)
    for size in (16, 32, CHUNK_OUTPUTS):
        if torch.equal(torch.cat([_convert(part) for part in torch.split(probe, size)]), whole):
            return size
    return 0


@lru_cache(maxsize=8)
def _order(outputs: int) -> Tensor:
    """int64 [outputs]: which output the low and the high half of each byte of a block hold, for one input."""
    number = torch.arange(outputs, dtype=torch.int64, device="cpu")[:, None].expand(-1, 2)
    order = torch.zeros(outputs, dtype=torch.int64, device="cpu")
    for digit, place in ((number % 16, 1), (number // 16, 16)):
        row = _convert(digit.to(torch.uint8)).view(2, -1)[0]
        order += place * torch.stack((row & 15, row >> 4), -1).flatten().to(torch.int64)
    return order
