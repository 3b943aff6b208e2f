"""The functions of torch that this project calls and that torch does not promise to keep.

Each name is the function, or None where this version or build of torch lacks it. What happens then:

    flash_attention_cpu      attention.py computes tiles by two matmuls
    flash_attention_cuda     the same, on CUDA
    linear_pointwise         linear.py calls F.linear, and weights stay as they were read
    reorder_linear_weight    the same, for bfloat16
    mkldnn_supports_bf16     the same, for bfloat16
    int8_matmul              quantized.py dequantises int8 weights before each product
    int4_matmul              the same, for int4
    int4_convert             the same, for int4
    aoti_runner_cpu          compiled/library.py raises CompileError, which names the backend that works
    fake_tensor_mode         the same
    inductor                 the same
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "aoti_runner_cpu",
    "fake_tensor_mode",
    "flash_attention_cpu",
    "flash_attention_cuda",
    "inductor",
    "int4_convert",
    "int4_matmul",
    "int8_matmul",
    "linear_pointwise",
    "mkldnn_supports_bf16",
    "reorder_linear_weight",
]


def _find(path: str) -> Callable[..., Any] | None:
    found: Any = torch
    try:
        for name in path.split("."):
            found = getattr(found, name)
    except (AttributeError, RuntimeError):
        return None
    return found  # type: ignore[no-any-return]


# Torch's guide to subclasses of tensors ("Extending PyTorch") tells to use it, so it is there in every version.
no_torch_function = torch._C.DisableTorchFunctionSubclass

flash_attention_cpu = _find("ops.aten._scaled_dot_product_flash_attention_for_cpu.default")
flash_attention_cuda = (
    _find("ops.aten._flash_attention_forward.default")
    if torch.backends.cuda.is_flash_attention_available()
    else None
)
int8_matmul = _find("_weight_int8pack_mm")
int4_matmul = _find("ops.aten._weight_int4pack_mm_for_cpu.default")
int4_convert = _find("ops.aten._convert_weight_to_int4pack_for_cpu.default")
aoti_runner_cpu = _find("_C._aoti.AOTIModelContainerRunnerCpu")
fake_tensor_mode = _find("_subclasses.FakeTensorMode")

_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
linear_pointwise = _find("ops.mkldnn._linear_pointwise.default") if _onednn else None
reorder_linear_weight = _find("ops.mkldnn._reorder_linear_weight") if _onednn else None
mkldnn_supports_bf16 = _find("ops.mkldnn._is_mkldnn_bf16_supported") if _onednn else None


def inductor() -> Any:
    """The module torch._inductor, with `aot_compile` and `config`; None without it. Importing it takes seconds."""
    try:
        import torch._inductor.config
    except ImportError:
        return None
    return torch._inductor if hasattr(torch._inductor, "aot_compile") else None
