"""Linear, and the layout in which its weight is stored: a CPU reads some layouts much faster than others.

Which layout and kernel are the fastest depends on the type, the number of rows and the processor's maker. The
figures below are from tools/bench.py decode on an AMD EPYC (Zen 4, AVX-512) and an Intel Xeon (AMX), 2026-11.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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

HALF = (torch.float16, torch.bfloat16)
# From this many rows on, int8 weights are dequantised once per product instead of read row by row.
INT8_DEQUANTIZE_ROWS = 64
FLOAT16_WIDEN_ROWS = 4  # from here on, float16 products run in float32


class Linear(nn.Linear):
    """x [..., in] -> [..., out]. Its weight is uninitialised: a checkpoint or a trainer fills it.

    `arrange` stores the weight in the layout that its device reads fastest; until then it is nn.Linear's. A
    subclass that computes more calls `self.kernel(x, self.weight, bias)`, which knows the layout.
    """

    kernel: Callable[[Tensor, Tensor, Tensor | None], Tensor] = staticmethod(F.linear)
    scale: Tensor  # [out], where the weight is int8

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x, self.weight, self.bias)

    def arrange(self) -> None:
        """Store the weight for inference on the CPU. On other devices and in float64 nothing changes.

        No second copy stays. A weight shared by a head and an embedding has the new layout in both.
        """
        weight = self.weight
        if weight.device.type == "cpu" and not weight.is_mkldnn and weight.dtype in LAYOUTS:
            LAYOUTS[weight.dtype](self)

    def arrange_by_rows(self) -> None:
        """Store the weight [out, in], without gaps between its rows."""
        self._unpack()
        self.weight.data = self.weight.data.contiguous()
        self.__dict__.pop("kernel", None)
        self._choose_kernel(arranged=False)
        if self.weight.device.type == "cpu" and self.weight.dtype in KERNELS_BY_ROWS:
            self.kernel = KERNELS_BY_ROWS[self.weight.dtype]

    def quantize(self) -> None:
        """Round the weight to int8, with one scale for each of its rows. The output keeps the input's type.

        The product with the rounded weight is computed as exactly as before. The scales go to the buffer
        `scale` [out]. A weight shared with an embedding is rounded for this layer only.
        """
        weight = (self.weight.to_dense() if self.weight.is_mkldnn else self.weight).detach()
        scale = (self.row_maxima(weight) / 127).clamp(min=1e-30)
        rounded = (weight / scale[:, None]).round_().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.register_buffer("scale", scale.to(weight.dtype if weight.dtype in HALF else torch.float32))
        self._choose_kernel(arranged=False)

    def row_maxima(self, weight: Tensor) -> Tensor:
        """The largest absolute value of each row, float32 [out]: int8 weights are scaled by it."""
        return weight.float().abs().amax(1)

    def _choose_kernel(self, arranged: bool) -> None:
        if self.weight.dtype == torch.int8:
            self.kernel = partial(int8_kernel, self.scale)
        elif arranged:
            self.arrange()

    def _unpack(self) -> None:
        if self.weight.is_mkldnn:
            self.weight = nn.Parameter(self.weight.to_dense(), requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        """Called by .to(), .float(), .cuda(): another type or device needs another layout."""
        self._unpack()
        arranged = self.__dict__.pop("kernel", None) is not None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._choose_kernel(arranged)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle, which cannot handle packed weights."""
        state = self.__dict__.copy()
        if self.weight.is_mkldnn:
            dense = nn.Parameter(self.weight.to_dense(), requires_grad=False)
            state["_parameters"] = {**self._parameters, "weight": dense}
        state["arranged"] = state.pop("kernel", None) is not None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        arranged = state.pop("arranged", False)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._choose_kernel(arranged)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.is_mkldnn:
            destination[prefix + "weight"] = self.weight.to_dense()


# Layouts and kernels by type


def is_copied(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the fastest layout in `dtype` differs from the one on disk, so that a copy is made."""
    if dtype == torch.bfloat16:
        return _can_pack()
    return dtype == torch.float32 and _columns_are_faster(weight.shape)


def _arrange_float32(linear: Linear) -> None:
    """Rows [out, in], as on disk, are the fastest or next to it for 1 to 512 rows of input, with oneDNN.

    One exception: on one thread, MKL reads a weight with more outputs than inputs 1.1 to 1.3 times as fast when
    it is stored by columns, [in, out]. More threads do not help it there.
    """
    weight = linear.weight
    if not _columns_are_faster(weight.shape):
        linear.arrange_by_rows()
    elif weight.stride() != (1, weight.shape[0]):
        weight.data = weight.data.t().contiguous().t()  # same shape and values, other strides
    linear.kernel = float32_kernel


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


def _arrange_bfloat16(linear: Linear) -> None:
    """oneDNN's own blocks: 1.5 to 3 times as fast for one row, and as fast for many."""
    if not _can_pack():
        return
    assert reorder_linear_weight is not None
    with torch.no_grad():
        packed = reorder_linear_weight(linear.weight.detach().contiguous(), 1)
    linear.weight = nn.Parameter(packed, requires_grad=False)
    linear.kernel = onednn_kernel


def _can_pack() -> bool:
    found = linear_pointwise is not None and reorder_linear_weight is not None
    return found and mkldnn_supports_bf16 is not None and bool(mkldnn_supports_bf16())


def _arrange_float16(linear: Linear) -> None:
    linear.kernel = float16_kernel


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
    return product if bias is None else product + bias  # type: ignore[no-any-return]


LAYOUTS: dict[torch.dtype, Callable[[Linear], None]] = {
    torch.float32: _arrange_float32,
    torch.bfloat16: _arrange_bfloat16,
    torch.float16: _arrange_float16,
}
KERNELS_BY_ROWS = {torch.float32: float32_kernel, torch.float16: float16_kernel}


# Whole models


def linears_to_arrange(model: nn.Module, dtype: torch.dtype, device: torch.device) -> list[Linear]:
    """The Linears of a model that `arrange` changes, once they are in `dtype` on `device`."""
    if device.type != "cpu" or dtype not in LAYOUTS:
        return []
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        module
        for module in model.modules()
        if isinstance(module, Linear)
        # An embedding cannot read a packed weight, and a second copy would cost its memory.
        and not (id(module.weight) in embeddings and dtype in HALF)
    ]


def arrange(model: nn.Module) -> None:
    """Store every Linear of a model in its fastest layout, in place. The logits stay, but for rounding."""
    weight = next(model.parameters())
    for linear in linears_to_arrange(model, weight.dtype, weight.device):
        linear.arrange()


def arrange_by_rows(model: nn.Module) -> None:
    """Store every Linear of a model [out, in], as on disk: the layout that compiled loops read."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.arrange_by_rows()


def quantize(model: nn.Module) -> None:
    """Round the weights of every Linear of a model to int8. Embeddings and norms stay as they are."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.quantize()
