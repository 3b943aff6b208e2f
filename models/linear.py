"""Linear, and the layout in which its weight is stored: a CPU reads some layouts much faster than others.

Which layout and kernel are the fastest depends on the type, the number of rows and the processor's maker. The
figures below are from tools/bench.py decode on an AMD EPYC (Zen 4, AVX-512) and an Intel Xeon (AMX), 2026-11.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamllm.models.packed_weight import PackedWeight, pack, unpack
from streamllm.models.processor import IS_INTEL
from streamllm.models.quantized import FORMATS, HALF, INT4, INT4_GROUP, INT8, format_of, has_whole_groups
from streamllm.models.torch_private import linear_pointwise, mkldnn_supports_bf16, reorder_linear_weight

FLOAT16_WIDEN_ROWS = 4  # from this many rows on, float16 products run in float32
BLOCK_COST_ROWS = 12  # what one more block costs, in rows: it reads the weight again
BLOCK_ROWS = (4, 8, 12, 16, 24, 32, 40, 48, 64)  # and powers of two from 128 on
MKL_COST = 1.15  # MKL's time for 8 to 128 rows of float32, oneDNN's being 1; on Intel's processors it is less


class Linear(nn.Linear):
    """x [..., in] -> [..., out]. Its weight is uninitialised: a checkpoint or a trainer fills it.

    `arrange` stores the weight in the layout that its device reads fastest; until then it is nn.Linear's. A
    subclass that computes more calls `self.kernel(x, self.weight, bias)`, which knows the layout.

    Where gradients are wanted, every kernel computes as F.linear does. `train()` unpacks a packed weight, and
    `eval()` packs it again.
    """

    kernel: Callable[[Tensor, Tensor, Tensor | None], Tensor] = staticmethod(F.linear)
    scale: Tensor  # of a rounded weight; see quantized.py

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x, self.weight, self.bias)

    def arrange(self) -> None:
        """Store the weight for inference on the CPU. On other devices and in float64 nothing changes.

        No second copy stays. A weight shared by a head and an embedding has the new layout in both.
        """
        weight = self.weight
        is_plain = weight.device.type == "cpu" and not isinstance(weight, PackedWeight)
        if is_plain and weight.dtype in LAYOUTS:
            LAYOUTS[weight.dtype](self)

    def arrange_by_rows(self) -> None:
        """Store the weight [out, in], without gaps between its rows."""
        if format_of(self.weight) is not None:
            return  # loops read rounded weights as they are
        unpack(self.weight)
        with torch.inference_mode(self.weight.is_inference()):  # else it could not be trained afterwards
            self.weight.data = self.weight.data.contiguous()
        self.__dict__.pop("kernel", None)
        if self.weight.device.type == "cpu" and self.weight.dtype in KERNELS_BY_ROWS:
            self.kernel = KERNELS_BY_ROWS[self.weight.dtype]

    def quantize(self, name: str = "int8") -> None:
        """Round the weight to "int8" or "int4" (quantized.py). The output keeps the input's type.

        The product with the rounded weight is computed as exactly as before. The scales go to the buffer `scale`.
        A weight shared with an embedding is rounded for this layer only. A rounded weight stays as it is. int8 is
        taken instead of int4 where the inputs cannot be divided into groups.
        """
        if name not in FORMATS:
            raise ValueError(f"a weight can be rounded to {' or '.join(FORMATS)}, not {name!r}")
        if format_of(self.weight) is not None:
            return
        weight = self.weight.detach()
        if name == INT4.name and self.has_whole_groups():
            numbers, scale = INT4.round(weight, INT4_GROUP)
        else:
            numbers, scale = INT8.round(weight, self.row_maxima(weight))
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.register_buffer("scale", scale)
        self._choose_kernel(arranged=False)

    def train(self, mode: bool = True) -> Linear:
        """As nn.Module's. A packed weight is unpacked for training, and packed again by `eval()`."""
        super().train(mode)
        if mode:
            unpack(self.weight)
        elif self.kernel is bfloat16_kernel:
            self.arrange()
        return self

    def row_maxima(self, weight: Tensor) -> Tensor:
        """The largest absolute value of each row, float32 [out]: int8 weights are scaled by it."""
        return weight.float().abs().amax(1)

    def has_whole_groups(self) -> bool:
        """Whether the inputs can be divided into the groups of int4."""
        return has_whole_groups(self.in_features)

    def _choose_kernel(self, arranged: bool) -> None:
        format = format_of(self.weight)
        if format is not None:
            self._set_rounded(*format.for_device(self.weight.data, self.scale))
            self.kernel = partial(quantized_kernel, self.scale)
        elif arranged:
            self.arrange()
            if self.training:
                unpack(self.weight)

    def _rounded_by_rows(self) -> tuple[Tensor, Tensor] | None:
        """Numbers and scales in the layout that every device reads; None where the weight is not rounded."""
        format = format_of(self.weight)
        return None if format is None else format.by_rows(self.weight.data, self.scale)

    def _set_rounded(self, numbers: Tensor, scale: Tensor) -> None:
        self.weight.data, self.scale = numbers, scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        """Called by .to(), .float(), .cuda(): another type or device needs another layout."""
        unpack(self.weight)
        rounded = self._rounded_by_rows()
        if rounded is not None:
            self._set_rounded(*rounded)
        arranged = self.__dict__.pop("kernel", None) is not None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._choose_kernel(arranged)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: the copy of a packed weight is plain, and is packed by the copy."""
        state = self.__dict__.copy()
        state["arranged"] = state.pop("kernel", None) is not None
        rounded = self._rounded_by_rows()
        if rounded is not None:  # another processor may need other blocks
            numbers, scale = rounded
            state["_parameters"] = {**self._parameters, "weight": nn.Parameter(numbers, requires_grad=False)}
            state["_buffers"] = {**self._buffers, "scale": scale}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        arranged = state.pop("arranged", False)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._choose_kernel(arranged)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        rounded = self._rounded_by_rows()
        if rounded is not None:
            destination[prefix + "weight"], destination[prefix + "scale"] = rounded

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        given = state_dict.get(prefix + "weight")
        format = format_of(self.weight)
        if given is not None and format_of(given) is not format:
            errors.append(
                f"{prefix}weight is {given.dtype} in the state and {self.weight.dtype} here: quantize both "
                f"models or neither, to the same type"
            )
            return
        rounded = self._rounded_by_rows()
        if rounded is not None:
            self._set_rounded(*rounded)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if format is not None:
            self._choose_kernel(arranged=False)  # with assign=True, the scale is another tensor
        elif "kernel" in self.__dict__ and not self.training:
            self.arrange()


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
        with torch.inference_mode(weight.is_inference()):  # else it could not be trained afterwards
            weight.data = weight.data.t().contiguous().t()  # same shape and values, other strides
    linear.kernel = float32_kernel


def _columns_are_faster(shape: torch.Size) -> bool:
    return (torch.get_num_threads() == 1 or linear_pointwise is None) and shape[0] >= shape[1]


def float32_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear by oneDNN where that is faster than torch's own choice, MKL."""
    if linear_pointwise is None or _needs_torch(x, weight, bias):
        return F.linear(x, weight, bias)
    rows = x.numel() // x.shape[-1]
    by_columns = weight.stride(1) != 1
    if by_columns and rows == 1:
        return F.linear(x, weight, bias)
    # On Intel's processors, MKL takes 0.5 to 1 times as long as oneDNN for these.
    if IS_INTEL and not (2 < rows < 128 and weight.numel() > 1 << 20):
        return F.linear(x, weight, bias)
    # MKL needs no blocks: it takes any number of rows, and keeps nothing for it.
    if _blocks_cost(rows) > MKL_COST * (rows + BLOCK_COST_ROWS):
        return F.linear(x, weight, bias)
    if by_columns and weight.stride(1) != weight.shape[0]:  # a view of fused weights, slow in oneDNN
        if rows < 16:
            return F.linear(x, weight, bias)
        weight = weight.t().contiguous().t()
    return onednn_kernel(x, weight, bias)


def onednn_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear by oneDNN, of a dense or a packed weight, without gradients."""
    assert linear_pointwise is not None
    if bias is not None and bias.stride(0) != 1:  # oneDNN ignores the stride of a bias
        bias = bias.contiguous()
    if x.dim() < 2 or x.shape[-2] == 1:  # decoding: the rows are the streams, whose number seldom changes
        return linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    return in_row_blocks(lambda part: linear_pointwise(part, weight, bias, "none", [], ""), x)


def in_row_blocks(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The product of x [..., T, in], computed in blocks of few sizes, without gradients.

    oneDNN prepares a kernel for each number of rows that it meets, in a millisecond and 0.6 MB, and keeps it in
    the process (tools/variety.py).
    """
    rows = x.numel() // x.shape[-1]
    blocks = row_blocks(rows)
    if blocks == (rows,):
        return product(x)
    parts, left = [], x.reshape(rows, x.shape[-1])
    for size in blocks:
        part, left = left[:size], left[size:]
        parts.append(product(F.pad(part, (0, 0, 0, size - len(part))) if len(part) < size else part))
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole[:rows].view(*x.shape[:-1], -1)


@lru_cache(maxsize=1024)
def row_blocks(rows: int) -> tuple[int, ...]:
    """Sizes out of `BLOCK_ROWS` that together hold this many rows, the last one perhaps padded; one row stays alone.

    The cheaper of two ways: one block that holds all, or the largest full block and then the rest.
    """
    if rows <= 1:
        return (rows,)
    power = 1 << (rows - 1).bit_length()
    padded = power if power > 128 else next((size for size in BLOCK_ROWS if size >= rows), 128)
    if padded == rows or rows < BLOCK_ROWS[0]:
        return (padded,)
    largest = power // 2 if rows >= 128 else max(size for size in BLOCK_ROWS if size <= rows)
    split = (largest, *row_blocks(rows - largest))
    return min((padded,), split, key=_cost)


def _cost(blocks: tuple[int, ...]) -> int:
    """The time that blocks take, in rows."""
    return sum(blocks) + len(blocks) * BLOCK_COST_ROWS


@lru_cache(maxsize=1024)
def _blocks_cost(rows: int) -> int:
    return _cost(row_blocks(rows))


def _needs_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether torch's own F.linear must compute the product: for gradients, autocast and torch.export."""
    if torch.is_grad_enabled():
        wanted = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        if wanted:
            return True
    return torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting()


def _arrange_bfloat16(linear: Linear) -> None:
    """oneDNN's own blocks: 1.5 to 3 times as fast for one row, and as fast for many."""
    if not _can_pack():
        return
    pack(linear.weight)
    linear.kernel = bfloat16_kernel


def bfloat16_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of a packed weight, or of one that was unpacked for training."""
    if not isinstance(weight, PackedWeight) or _needs_torch(x, weight, bias):
        return torch_kernel(x, weight, bias)
    return onednn_kernel(x, weight.packed, bias)


def torch_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear; in blocks where torch hands it to oneDNN, for half types on a CPU, and no gradients are wanted."""
    if x.device.type != "cpu" or x.dtype not in HALF or _needs_torch(x, weight, bias):
        return F.linear(x, weight, bias)
    if x.dim() < 2 or x.shape[-2] == 1:
        return F.linear(x, weight, bias)
    return in_row_blocks(lambda part: F.linear(part, weight, bias), x)


def _can_pack() -> bool:
    found = linear_pointwise is not None and reorder_linear_weight is not None
    return found and mkldnn_supports_bf16 is not None and bool(mkldnn_supports_bf16())


def _arrange_float16(linear: Linear) -> None:
    linear.kernel = float16_kernel


def float16_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, in float32 for many rows: a CPU multiplies them in float16 at a fifth of float32's speed."""
    if x.numel() < FLOAT16_WIDEN_ROWS * x.shape[-1] or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    wide = float32_kernel(x.float(), weight.float(), None if bias is None else bias.float())
    return wide.to(x.dtype)


def quantized_kernel(scale: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x times a rounded weight, by the kernel of its format, or dequantised first."""
    format = format_of(weight)
    assert format is not None
    rows = x.numel() // x.shape[-1]
    product = None
    if rows < format.dequantize_rows and not _needs_torch(x, scale, bias):
        product = format.product(x.reshape(rows, x.shape[-1]), weight, scale)
    if product is None:
        return torch_kernel(x, format.dequantized(weight, scale, x.dtype), bias)
    product = product.view(*x.shape[:-1], -1)
    return product if bias is None else product + bias


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
    """Store every Linear of a model in its fastest layout, in place. The logits change by rounding only."""
    weight = next(model.parameters())
    for linear in linears_to_arrange(model, weight.dtype, weight.device):
        linear.arrange()


def arrange_by_rows(model: nn.Module) -> None:
    """Store every Linear of a model [out, in], as on disk: the layout that compiled loops read."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.arrange_by_rows()


def quantize(model: nn.Module, name: str = "int8") -> None:
    """Round the weights of every Linear of a model to "int8" or "int4". Embeddings and norms stay as they are."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.quantize(format_for(model, module, name))


def format_for(model: nn.Module, module: Linear, name: str) -> str:
    """The format of one Linear where the model is rounded to `name`: an int4 model keeps its head in int8.

    Errors of the head reach the logits directly, so an int4 head raises the perplexity.
    """
    return INT8.name if module is getattr(model, "head", None) else name
