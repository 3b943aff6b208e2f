"""The parts that every architecture is made of: Linear, RMSNorm, the activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamllm.models.cpu import INTEL

HALF = (torch.float16, torch.bfloat16)


class Linear(nn.Linear):
    """x [..., in] -> [..., out]. Built unset: a checkpoint or a trainer fills the weights.

    `arrange` lays the weight out as its device reads it fastest; until then it lies as nn.Linear's does. A
    subclass that computes otherwise calls `self.kernel(x, self.weight, bias)`, which knows the layout.
    """

    kernel: Callable[[Tensor, Tensor, Tensor | None], Tensor] = staticmethod(F.linear)
    scale: Tensor  # [out], where the weight is int8

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x, self.weight, self.bias)

    def arrange(self) -> None:
        """Lay the weight out for inference on the CPU; elsewhere, and in float64, nothing changes.

        No second copy stays. Where the weight is shared (a tied head), so is what becomes of it.
        """
        weight = self.weight
        if weight.device.type != "cpu" or weight.is_mkldnn or weight.dtype not in _ARRANGED:
            return
        _ARRANGED[weight.dtype](self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        """What .to(), .float() and .cuda() call: another type or device wants another layout."""
        if self.weight.is_mkldnn:
            self.weight = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        arranged = self.__dict__.pop("kernel", None) is not None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._settle(arranged)
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
        self._settle(arranged)

    def _settle(self, arranged: bool) -> None:
        if self.weight.dtype == torch.int8:
            self.kernel = partial(_eight_bits, self.scale)
        elif arranged:
            self.arrange()

    def quantize(self) -> None:
        """Round the weight to int8, with a scale for each row of it; the output is still of the input's type.

        What is computed is the product with the rounded weight, as exactly as before. The scales go to a
        buffer, `scale` [out]; a weight shared with an embedding is rounded for this layer only.
        """
        weight = (self.weight.to_dense() if self.weight.is_mkldnn else self.weight).detach()
        scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-30)
        rounded = (weight / scale[:, None]).round_().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.register_buffer("scale", scale.to(weight.dtype if weight.dtype in HALF else torch.float32))
        self._settle(arranged=False)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.is_mkldnn:
            destination[prefix + "weight"] = self.weight.to_dense()


def to_arrange(model: nn.Module, dtype: torch.dtype, device: torch.device) -> list[Linear]:
    """The Linears of a model that `arrange` is good for, once they are in `dtype` on `device`."""
    if device.type != "cpu" or dtype not in _ARRANGED:
        return []
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        module
        for module in model.modules()
        if isinstance(module, Linear)
        # An embedding cannot be packed, and a second copy would cost its memory.
        and not (id(module.weight) in shared and dtype in HALF)
    ]


def is_copied(linear: Linear, dtype: torch.dtype) -> bool:
    """Whether `arrange` lays a weight in `dtype` out anew. Else it stays where it was read."""
    if dtype == torch.bfloat16:
        return _packs()
    return dtype == torch.float32 and _lies_by_columns(linear.weight.shape)


def arrange(model: nn.Module) -> None:
    """Lay out every Linear of a model for inference where it is. The logits stay, to rounding."""
    weight = next(model.parameters())
    for linear in to_arrange(model, weight.dtype, weight.device):
        linear.arrange()


def arrange_by_rows(model: nn.Module) -> None:
    """Lay out every Linear of a model [out, in], as on disk: what compiled loops over its outputs read."""
    for module in model.modules():
        if isinstance(module, Linear):
            _by_rows(module)


def quantize(model: nn.Module) -> None:
    """Round the weights of every Linear of a model to int8. Embeddings and norms stay as they are."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.quantize()


def _eight_bits(scale: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # torch's kernel reads a row at 12 to 15 GB/s of int8, and loses against a matrix unpacked for the occasion
    # from about 64 rows on.
    rows = x.numel() // x.shape[-1]
    if rows < 64 and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        product = torch._weight_int8pack_mm(x.reshape(rows, x.shape[-1]), weight, scale)
        product = product.view(*x.shape[:-1], -1)
        return product if bias is None else product + bias
    return F.linear(x, weight.to(x.dtype) * scale.to(x.dtype)[:, None], bias)


# The kernels of a CPU, per number of rows, measured on a Zen 4 with AVX-512; where another one matters, on a
# Xeon with AMX, too.


def _rows_or_columns(linear: Linear) -> None:
    """float32, for oneDNN: [out, in], as on disk, with one to 512 rows the fastest or next to it.

    But on one thread, a row of more outputs than inputs is read 1.1 to 1.3 times as fast by MKL, from weights
    stored [in, out]. More threads do not help MKL there; but on Intel's processors: see `_float32`.
    """
    weight = linear.weight
    if not _lies_by_columns(weight.shape):
        _by_rows(linear)
    elif weight.stride() != (1, weight.shape[0]):
        weight.data = weight.data.t().contiguous().t()  # shape and values stay: only strides change
    linear.kernel = _float32


def _lies_by_columns(shape: torch.Size) -> bool:
    return (torch.get_num_threads() == 1 or not _ONEDNN) and shape[0] >= shape[1]


def _by_rows(linear: Linear) -> None:
    """[out, in], without gaps between the rows of inputs."""
    if linear.weight.is_mkldnn:
        linear.weight = nn.Parameter(linear.weight.to_dense(), requires_grad=False)
    linear.weight.data = linear.weight.data.contiguous()
    linear.__dict__.pop("kernel", None)
    linear._settle(arranged=False)
    if linear.weight.dtype == torch.float32 and linear.weight.device.type == "cpu":
        linear.kernel = _float32


def _float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _ONEDNN or x.requires_grad or weight.requires_grad:  # oneDNN has no gradients
        return F.linear(x, weight, bias)
    rows = x.numel() // x.shape[-1]
    by_columns = weight.stride(1) != 1
    if by_columns and rows == 1:
        return F.linear(x, weight, bias)
    if INTEL and not (2 < rows < 128 and weight.numel() > 1 << 20):  # where MKL is 1 to 2 times as fast
        return F.linear(x, weight, bias)
    if by_columns and weight.stride(1) != weight.shape[0]:  # a view of fused weights: oneDNN takes ages
        if rows < 16:
            return F.linear(x, weight, bias)
        weight = weight.t().contiguous().t()
    return onednn(x, weight, bias)


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear by oneDNN, of a dense or a packed weight."""
    return _pointwise(x, weight, bias, "none", [], "")


def _packed(linear: Linear) -> None:
    """bfloat16: in oneDNN's own blocks, 1.5 to 3 times as fast for a row, and as fast for many."""
    if not _packs():
        return
    weight = linear.weight
    with torch.no_grad():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 1)
    linear.weight = nn.Parameter(packed, requires_grad=False)
    linear.kernel = onednn


def _packs() -> bool:
    return _ONEDNN and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _widened(linear: Linear) -> None:
    """float16: the CPU reads one row well, and multiplies many at a fifth of float32's speed."""
    linear.kernel = _float16


def _float16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.numel() < 4 * x.shape[-1]:
        return F.linear(x, weight, bias)
    wide = _float32(x.float(), weight.float(), None if bias is None else bias.float())
    return wide.to(x.dtype)


def _find_pointwise() -> Callable[..., Tensor] | None:
    """oneDNN's linear, which torch keeps to itself: where a version or a build lacks it, F.linear serves."""
    try:
        torch.ops.mkldnn._reorder_linear_weight.default  # noqa: B018
        torch.ops.mkldnn._is_mkldnn_bf16_supported.default  # noqa: B018
        return torch.ops.mkldnn._linear_pointwise.default
    except (AttributeError, RuntimeError):
        return None


_ONEDNN = torch.backends.mkldnn.is_available() and _find_pointwise() is not None  # type: ignore[no-untyped-call]
_pointwise: Callable[..., Tensor] = _find_pointwise() or F.linear
_ARRANGED: dict[torch.dtype, Callable[[Linear], None]] = {
    torch.float32: _rows_or_columns,
    torch.bfloat16: _packed,
    torch.float16: _widened,
}


class Embedding(nn.Embedding):
    """int64 [...] -> [..., C]. Built unset, as Linear is."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467), in float32 for half types, over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in HALF:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        if x.is_cuda:  # one kernel instead of five: between small kernels a GPU waits longer than they take
            normed = F.rms_norm(wide, self.weight.shape, None, self.eps)
        else:
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)  # rounded before the weight, as the models were trained


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


# The names of config.json. gelu is the exact one; the others differ from it by about 1e-3 in the logits.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_fast": _gelu_fast,
    "quick_gelu": _quick_gelu,
}
