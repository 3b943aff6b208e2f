"""How a CPU reads the weight of a Linear fastest: its layout in memory, and the kernel that reads it.

Which kernel is the fastest depends on the type, the number of rows and the processor's maker. The figures below
are from tools/bench.py decode on an AMD EPYC (Zen 4, AVX-512) and an Intel Xeon (AMX), 2026-11.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamllm.models.processor import IS_INTEL
from streamllm.models.torch_private import (
    int8_matmul,
    linear_pointwise,
    mkldnn_supports_bf16,
    reorder_linear_weight,
)

# From this many rows on, int8 weights are dequantised once per product instead of read row by row.
INT8_DEQUANTIZE_ROWS = 64
FLOAT16_WIDEN_ROWS = 4  # from here on, float16 products run in float32


def is_copied(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the fastest layout in `dtype` differs from the one on disk, so that a copy is made."""
    if dtype == torch.bfloat16:
        return _can_pack()
    return dtype == torch.float32 and _columns_are_faster(weight.shape)


def _arrange_float32(linear: nn.Linear) -> None:
    """Rows [out, in], as on disk, are the fastest or next to it for 1 to 512 rows of input, with oneDNN.

    One exception: on one thread, MKL reads a weight with more outputs than inputs 1.1 to 1.3 times as fast when
    it is stored by columns, [in, out]. More threads do not help it there.
    """
    weight = linear.weight
    if not _columns_are_faster(weight.shape):
        linear.arrange_by_rows()  # type: ignore[operator]
    elif weight.stride() != (1, weight.shape[0]):
        weight.data = weight.data.t().contiguous().t()  # same shape and values, other strides
    linear.kernel = float32_kernel  # type: ignore[assignment]


def _columns_are_faster(shape: torch.Size) -> bool:
    return (torch.get_num_threads() == 1 or linear_pointwise is None) and shape[0] >= shape[1]


def float32_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear by oneDNN where that is faster than torch's own choice, MKL."""
    if linear_pointwise is None or x.requires_grad or weight.requires_grad:  # oneDNN has no gradients
        return F.linear(x, weight, bias)
    rows = x.numel() // x.shape[-1]
    by_columns = weight.stride(1) != 1
    if by_columns and rows == 1:
        return F.linear(x, weight, bias)
    if IS_INTEL and not (
        2 < rows < 128 and weight.numel() > 1 << 20
    ):  # MKL takes 0.5 to 1 times as long there
        return F.linear(x, weight, bias)
    if by_columns and weight.stride(1) != weight.shape[0]:  # a view of fused weights, slow in oneDNN
        if rows < 16:
            return F.linear(x, weight, bias)
        weight = weight.t().contiguous().t()
    return onednn_kernel(x, weight, bias)


def onednn_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear by oneDNN, of a dense or a packed weight."""
    assert linear_pointwise is not None
    return linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def _arrange_bfloat16(linear: nn.Linear) -> None:
    """oneDNN's own blocks: 1.5 to 3 times as fast for one row, and as fast for many."""
    if not _can_pack():
        return
    assert reorder_linear_weight is not None
    with torch.no_grad():
        packed = reorder_linear_weight(linear.weight.detach().contiguous(), 1)
    linear.weight = nn.Parameter(packed, requires_grad=False)
    linear.kernel = onednn_kernel  # type: ignore[assignment]


def _can_pack() -> bool:
    found = linear_pointwise is not None and reorder_linear_weight is not None
    return found and mkldnn_supports_bf16 is not None and bool(mkldnn_supports_bf16())


def _arrange_float16(linear: nn.Linear) -> None:
    linear.kernel = float16_kernel  # type: ignore[assignment]


def float16_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A CPU reads float16 well for one row, but multiplies many rows at a fifth of float32's speed."""
    if x.numel() < FLOAT16_WIDEN_ROWS * x.shape[-1]:
        return F.linear(x, weight, bias)
    wide = float32_kernel(x.float(), weight.float(), None if bias is None else bias.float())
    return wide.to(x.dtype)


def int8_kernel(scale: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x times an int8 weight [out, in] with a scale for each output: in torch's kernel, or dequantised first."""
    rows = x.numel() // x.shape[-1]
    on_cpu = x.device.type == "cpu" and x.dtype == torch.bfloat16
    if int8_matmul is None or rows >= INT8_DEQUANTIZE_ROWS or not on_cpu:
        return F.linear(x, weight.to(x.dtype) * scale.to(x.dtype)[:, None], bias)
    product = int8_matmul(x.reshape(rows, x.shape[-1]), weight, scale).view(*x.shape[:-1], -1)
    return product if bias is None else product + bias


LAYOUTS: dict[torch.dtype, Callable[[Any], None]] = {
    torch.float32: _arrange_float32,
    torch.bfloat16: _arrange_bfloat16,
    torch.float16: _arrange_float16,
}
