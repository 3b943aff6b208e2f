"""The layers that all architectures are made of: Linear, Embedding, RMSNorm, the activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamllm.models import cpu_layouts

HALF = (torch.float16, torch.bfloat16)


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

        No second copy stays. Where the weight is shared (a tied head), both owners get the new layout.
        """
        weight = self.weight
        if weight.device.type == "cpu" and not weight.is_mkldnn and weight.dtype in cpu_layouts.LAYOUTS:
            cpu_layouts.LAYOUTS[weight.dtype](self)

    def arrange_by_rows(self) -> None:
        """Store the weight [out, in], without gaps between its rows."""
        self._unpack()
        self.weight.data = self.weight.data.contiguous()
        self.__dict__.pop("kernel", None)
        self._choose_kernel(arranged=False)
        if self.weight.dtype == torch.float32 and self.weight.device.type == "cpu":
            self.kernel = cpu_layouts.float32_kernel

    def quantize(self) -> None:
        """Round the weight to int8, with one scale for each of its rows. The output keeps the input's type.

        The product with the rounded weight is computed as exactly as before. The scales go to the buffer
        `scale` [out]. A weight shared with an embedding is rounded for this layer only.
        """
        weight = (self.weight.to_dense() if self.weight.is_mkldnn else self.weight).detach()
        scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-30)
        rounded = (weight / scale[:, None]).round_().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.register_buffer("scale", scale.to(weight.dtype if weight.dtype in HALF else torch.float32))
        self._choose_kernel(arranged=False)

    def _choose_kernel(self, arranged: bool) -> None:
        if self.weight.dtype == torch.int8:
            self.kernel = partial(cpu_layouts.int8_kernel, self.scale)
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


class Embedding(nn.Embedding):
    """int64 [...] -> [..., C]. Its weight is uninitialised, as Linear's."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467) over the last axis, in float32 for half types."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in HALF:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        if x.is_cuda:  # one kernel instead of five: on a GPU, small kernels cost more in gaps than in work
            normed = F.rms_norm(wide, self.weight.shape, None, self.eps)
        else:
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)  # rounded before the weight, as in training


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


# By their names in config.json. gelu is the exact one; the others move the logits by about 1e-3.
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


def linears_to_arrange(model: nn.Module, dtype: torch.dtype, device: torch.device) -> list[Linear]:
    """The Linears of a model that `arrange` changes, once they are in `dtype` on `device`."""
    if device.type != "cpu" or dtype not in cpu_layouts.LAYOUTS:
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
