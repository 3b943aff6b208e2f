"""Whether Triton kernels run here. Triton comes with torch's builds for CUDA; it is imported only when asked."""

from __future__ import annotations

import importlib.util
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch

DEVICES = ("cuda",)  # device types whose recordings are rewritten; tests add "cpu", for Triton's interpreter
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEAST_CAPABILITY = (8, 0)


def supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a decoding step in this type on this device is rewritten into Triton kernels."""
    return device.type in DEVICES and dtype in DTYPES and _works(device)


@lru_cache(maxsize=16)
def _works(device: torch.device) -> bool:
    """Compiles and runs one kernel. Where that fails, as without a C compiler, warns once and says False."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cuda" and (
        torch.version.cuda is None or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY
    ):
        return False
    try:
        from streamllm.compiled import triton_launch

        x = torch.ones(1, 1, 16, dtype=torch.float32, device=device)
        with torch.inference_mode(), on(device):
            triton_launch.gated(x, x, 0)
    except Exception as error:
        warn(error)
        return False
    return True


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, not on that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def warn(error: Exception) -> None:
    """Warns that the step runs without Triton."""
    text = " ".join(str(error).split())[:300]
    warnings.warn(
        f"Triton does not work here ({type(error).__name__}: {text}): tokens are decoded by torch's own kernels, "
        f"which takes about 1.6 times as long",
        stacklevel=2,
    )
