"""A ring that stores recent keys and values in int8, and sinks exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from streamllm.cache.memory import zeros
from streamllm.cache.ring import Layout, Move, Shape, put


class Int8Ring:
    """As `Ring`, but a recent key or value [D] is stored as int8 numbers in -127 … 127 times a scale of its own.

    The sinks stay exact: every later token attends to them, and they are few. Keys and values lie together,
    [2, B, G, slots, …], so that one token takes half as many small kernels.
    """

    def __init__(self, shape: Shape, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        batch, heads, dim = shape
        self.dtype = dtype
        self.sinks = zeros((2, batch, heads, layout.sinks, dim), dtype, device)
        self.scales = zeros((2, batch, heads, layout.window, 1), dtype, device)
        self.numbers = zeros((2, batch, heads, layout.window, dim), torch.int8, device)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"sinks": self.sinks, "scales": self.scales, "numbers": self.numbers}

    def first(self, slots: int) -> dict[str, Tensor]:
        recent = max(0, slots - self.sinks.shape[3])
        return {
            "sinks": self.sinks,
            "scales": self.scales[:, :, :, :recent],
            "numbers": self.numbers[:, :, :, :recent],
        }

    def encode(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.stack((k, v))
        heads, dim = self.numbers.shape[2], self.numbers.shape[4]
        if both.shape[2] != heads or both.shape[4] != dim:  # index_copy_ would broadcast them
            raise ValueError(
                f"the cache was made for keys of {heads} heads of {dim}, the model's are {list(k.shape)}"
            )
        return _rounded(both, self.dtype)

    def write_now(self, move: Move, k: Tensor, v: Tensor) -> None:
        if move.to_sinks:
            self._write_sinks(move, torch.stack((k, v)))
        if move.to_ring:
            self.write(move, *self.encode(k, v))

    def _write_sinks(self, move: Move, both: Tensor) -> None:
        slots = move.slots
        if move.to_ring:  # single tokens, of which some or all are not sinks: for these, write what is there
            slots = slots.clamp(max=self.sinks.shape[3] - 1)
            is_sink = (move.slots == slots).view(-1, 1, 1, 1)  # [R, 1, 1, 1]
            batch = torch.arange(both.shape[1], dtype=torch.int64, device=slots.device)
            there = self.sinks[:, batch, :, slots.expand(len(batch))].movedim(0, 1)  # [2, B, G, D]
            both = torch.where(is_sink, both, there[:, :, :, None])
        put(self.sinks, move, slots, both)

    def write(self, move: Move, numbers: Tensor, scales: Tensor) -> None:
        slots = move.slots - self.sinks.shape[3]
        if move.to_sinks:  # a sink overwrites the first slot of the ring, which is empty then
            slots = slots.clamp(min=0)
        put(self.numbers, move, slots, numbers)
        put(self.scales, move, slots, scales)

    def take(self, rows: Tensor, slots: Tensor, turn: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """As `Ring.take`: scales and numbers [r, n, 2, G, …]. The turned keys are rounded again."""
        slots = slots - self.sinks.shape[3]
        scales, numbers = self.scales[:, rows, :, slots], self.numbers[:, rows, :, slots]
        wide = scales[:, :, 0].float() if scales.itemsize == 2 else scales[:, :, 0]
        keys, key_scales = _rounded(turn(numbers[:, :, 0] * wide), self.dtype)
        numbers[:, :, 0], scales[:, :, 0] = keys, key_scales
        return scales, numbers

    def replace(self, rows: Tensor, slots: Tensor, *taken: Tensor) -> None:
        slots = slots - self.sinks.shape[3]
        for store, entries in zip((self.scales, self.numbers), taken, strict=True):
            store[:, rows, :, slots] = entries

    def read(self, ranges: Sequence[tuple[int, int]], *chunk: Tensor) -> tuple[Tensor, Tensor]:
        return dequantize(*self.parts(ranges, *chunk))

    def parts(
        self, ranges: Sequence[tuple[int, int]], *chunk: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The sinks [2, B, G, …, D], then the numbers and the scales of each range and of a chunk."""
        first = self.sinks.shape[3]
        sinks = max((min(stop, first) for _, stop in ranges), default=0)
        slices = [slice(max(start - first, 0), stop - first) for start, stop in ranges if stop > first]
        recent: list[tuple[Tensor, ...]] = [
            (self.numbers[:, :, :, part], self.scales[:, :, :, part]) for part in slices
        ]
        if chunk:
            recent.append(chunk)
        numbers, scales = zip(*recent, strict=True) if recent else ((), ())
        return self.sinks[:, :, :, :sinks], numbers, scales


def _rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """int8 numbers [..., D] and their scales [..., 1] in `dtype`."""
    # Divide by the scale as it is stored: then a scale in bfloat16 loses no more than one in float32.
    # of a Gaussian vector.
    scales = (x.abs().amax(-1, keepdim=True) / 127).to(dtype)
    wide = scales.float() if scales.itemsize == 2 else scales
    numbers = x / wide.clamp(min=torch.finfo(wide.dtype).tiny)
    return numbers.round_().clamp_(-127, 127).to(torch.int8), scales


def dequantize(sinks: Tensor, numbers: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values, [B, G, K, D] each: the sinks, then numbers · scales; all parts [2, B, G, …, D]."""
    *outer, sunk, dim = sinks.shape
    sizes = [sunk, *(part.shape[3] for part in numbers)]
    # Products are written where the result stands: joining them afterwards would copy all keys and values.
    both = sinks.new_empty(*outer, sum(sizes), dim)
    first, *places = torch.split(both, sizes, 3)
    first.copy_(sinks)
    for place, number, scale in zip(places, numbers, scales, strict=True):
        place.copy_(number).mul_(scale)
    keys, values = both.unbind()
    return keys, values
