"""Rounded weights: int8 with a scale for each output, and int4 with a scale for each group of inputs.

A weight's dtype tells its format: int8 numbers are torch.int8, and int4 numbers are two in each torch.uint8.
`linear.py` computes with any of them in the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from streamllm.models import int4_blocks
from streamllm.models.torch_private import int4_matmul, int8_matmul

HALF = (torch.float16, torch.bfloat16)
INT8_MATMUL_INPUTS = 16  # torch's int8 kernel reads this many inputs at a time
# Inputs that share a scale. On the embedded checkpoint the perplexity is 10.34 in bfloat16, 11.46 in groups of 32 and
# 11.8 in groups of 64 (streamllm perplexity --window 252 --tokens 60000 --quantize int4; AMD EPYC, 2026-11).
INT4_GROUP = 32


class Format:
    """How a rounded weight [out, in] is stored, as numbers and scales, and how it is multiplied."""

    name: str
    dtype: torch.dtype  # of the stored numbers
    dequantize_rows: int  # from this many rows of input on, dequantising the weight first is faster

    def product(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor | None:
        """x [rows, in] -> [rows, out], by a kernel that reads the numbers; None where no kernel takes these."""
        raise NotImplementedError

    def dequantized(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """[out, in] in `dtype`."""
        raise NotImplementedError

    def shape(self, weight: Tensor) -> tuple[int, int]:
        """(out, in)."""
        raise NotImplementedError

    def nbytes(self, outputs: int, inputs: int, itemsize: int) -> int:
        """Of numbers and scales. itemsize: bytes of a scale."""
        raise NotImplementedError

    def for_device(self, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The same numbers and scales, in the layout that the device reads fastest."""
        return weight, scale

    def by_rows(self, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The same numbers and scales, in the layout that every device reads; that of state_dict."""
        return weight, scale

    def sample(self, weight: Tensor, scale: Tensor, output: int, inputs: int) -> tuple[float, float]:
        """One value of the weight, and the step to which it was rounded."""
        raise NotImplementedError


class _Int8(Format):
    """Numbers int8 [out, in], scale [out]."""

    name, dtype, dequantize_rows = "int8", torch.int8, 64

    def round(self, weight: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
        """A weight [out, in] as numbers -127 … 127 and scales. maxima float32 [out]: of the absolute values."""
        scale = _nonzero(maxima / 127, weight.dtype)
        numbers = (weight / _wide(scale, weight.dtype)[:, None]).round_()
        return numbers.clamp_(-127, 127).to(torch.int8), scale

    def product(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor | None:
        """torch's kernel does not check its input. It reads beyond a row whose length is no multiple of 16. It crashes
        where a row of x does not begin at a multiple of 32 bytes, or a row of the weight at a multiple of 16.
        """
        if (
            int8_matmul is None
            or x.device.type != "cpu"
            or x.dtype != torch.bfloat16  # slow for other types
            or scale.dtype != torch.bfloat16
            or weight.shape[1] % INT8_MATMUL_INPUTS != 0
            or weight.shape[1] != x.shape[1]
            or not weight.is_contiguous()
            or not scale.is_contiguous()
            or not _is_aligned(weight, 16)
        ):
            return None
        x = x.contiguous()
        return int8_matmul(x if _is_aligned(x, 32) else x.clone(), weight, scale)  # type: ignore[no-any-return]

    def dequantized(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype) * scale.to(dtype)[:, None]

    def shape(self, weight: Tensor) -> tuple[int, int]:
        return weight.shape[0], weight.shape[1]

    def nbytes(self, outputs: int, inputs: int, itemsize: int) -> int:
        return outputs * (inputs + itemsize)

    def sample(self, weight: Tensor, scale: Tensor, output: int, inputs: int) -> tuple[float, float]:
        step = float(scale[output])
        return float(weight[output, inputs]) * step, abs(step)


class _Int4(Format):
    """Numbers -8 … 7, stored as 0 … 15.

    By rows: uint8 [out, in / 2], scale [out, groups]. A byte holds input i of a group, in its lower half, and
    input i + group / 2. On the CPU in bfloat16: the blocks of int4_blocks.py, also uint8 [out, in / 2], and the
    scales and offsets [groups, out, 2] that torch's kernel reads. The offsets are 0.
    """

    name, dtype, dequantize_rows = "int4", torch.uint8, 64

    def round(self, weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """A weight [out, in] by rows. The value that is farthest from 0 in its group becomes -8.

        A scale that minimises the squared error clips the largest weights, and gives a higher perplexity.
        """
        groups = weight.reshape(len(weight), -1, group)
        farthest = groups.gather(2, groups.abs().argmax(2, keepdim=True))[:, :, 0]
        scale = _nonzero(farthest.float() / -8, weight.dtype)
        numbers = (groups / _wide(scale, weight.dtype)[:, :, None]).round_().clamp_(-8, 7)
        return _paired((numbers + 8).to(torch.uint8)), scale

    def product(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor | None:
        if int4_matmul is None or not _are_blocks(scale) or x.dtype != scale.dtype:
            return None
        group = x.shape[1] // scale.shape[0]
        return int4_matmul(x.contiguous(), weight, group, scale)  # type: ignore[no-any-return]

    def dequantized(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return dequantized_rows(*self.by_rows(weight, scale), dtype)

    def shape(self, weight: Tensor) -> tuple[int, int]:
        return weight.shape[0], 2 * weight.shape[1]

    def nbytes(self, outputs: int, inputs: int, itemsize: int) -> int:
        """Of numbers, scales and offsets, as the CPU's kernel reads them."""
        return outputs * (inputs // 2 + inputs // INT4_GROUP * 2 * itemsize)

    def for_device(self, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        if (
            _are_blocks(scale)
            or weight.device.type != "cpu"
            or scale.dtype != torch.bfloat16  # torch's kernel is far slower for other types
            or 2 * weight.shape[1] // scale.shape[1] not in (32, 64, 128, 256)
            or not int4_blocks.are_readable(len(weight))
        ):
            return weight, scale
        blocks = int4_blocks.to_blocks(_unpaired(weight, scale.shape[1]).flatten(1))
        return blocks, torch.stack((scale.t(), torch.zeros_like(scale.t())), -1)

    def by_rows(self, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        if not _are_blocks(scale):
            return weight, scale
        numbers = int4_blocks.from_blocks(weight)
        rows = scale[:, :, 0].t().contiguous()
        return _paired(numbers.view(len(numbers), rows.shape[1], -1)), rows

    def sample(self, weight: Tensor, scale: Tensor, output: int, inputs: int) -> tuple[float, float]:
        start = output - output % int4_blocks.CHUNK_OUTPUTS
        chunk = slice(start, start + int4_blocks.CHUNK_OUTPUTS)
        rows, scales = self.by_rows(weight[chunk], scale[:, chunk] if _are_blocks(scale) else scale[chunk])
        numbers = _unpaired(rows, scales.shape[1])[output - start]
        step = float(scales[output - start, inputs // numbers.shape[1]])
        return (float(numbers.flatten()[inputs]) - 8) * step, abs(step)


def dequantized_rows(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """int4 numbers and scales by rows -> [out, in] in `dtype`. A recording keeps it as one call."""
    if has_torch_function((weight, scale)):
        return handle_torch_function(dequantized_rows, (weight, scale), weight, scale, dtype)
    numbers = _unpaired(weight, scale.shape[1]).to(dtype) - 8
    return (numbers * scale.to(dtype)[:, :, None]).flatten(1)


def _paired(numbers: Tensor) -> Tensor:
    """[out, groups, group] -> bytes [out, in / 2]."""
    low, high = numbers.chunk(2, 2)
    return (low | (high << 4)).flatten(1)


def _unpaired(weight: Tensor, groups: int) -> Tensor:
    """Bytes [out, in / 2] -> numbers 0 … 15, uint8 [out, groups, group]."""
    pairs = weight.view(len(weight), groups, -1)
    return torch.cat((pairs & 15, pairs >> 4), 2)


def _are_blocks(scale: Tensor) -> bool:
    return scale.dim() == 3


def _nonzero(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it is stored for a weight of `dtype`, and not 0."""
    stored = dtype if dtype in HALF else torch.float32
    least = 2.0**-24 if stored == torch.float16 else torch.finfo(stored).tiny
    return torch.where(scale.abs() < least, least, scale).to(stored)


def _wide(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The stored scale, widened. Dividing a weight by it makes up for the rounding of the scale."""
    return scale.to(torch.promote_types(dtype, torch.float32))


def _is_aligned(x: Tensor, nbytes: int) -> bool:
    return torch.compiler.is_compiling() or x.data_ptr() % nbytes == 0  # what torch.compile makes is aligned


INT8, INT4 = _Int8(), _Int4()
FORMATS: dict[str, Format] = {format.name: format for format in (INT8, INT4)}


def format_of(weight: Tensor) -> Format | None:
    """The format of a rounded weight; None for any other."""
    return _BY_DTYPE.get(weight.dtype)


def has_whole_groups(inputs: int) -> bool:
    """Whether a row of this many inputs can be divided into the groups of int4."""
    return inputs % INT4_GROUP == 0


_BY_DTYPE: dict[torch.dtype, Format] = {format.dtype: format for format in FORMATS.values()}
