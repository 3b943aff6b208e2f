"""The memory of a cache, which a CPU takes as the cache fills."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from streamllm.malloc import anonymous_memory

LAZY_BYTES = 1 << 16  # smaller tensors come from torch's allocator


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.zeros. On a CPU the system gives each page of memory only when it is first written.

    So a short stream with a long window takes the memory of its own tokens. An accelerator gives all at once, because
    recorded steps keep addresses.
    """
    count = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or count < LAZY_BYTES:
        return torch.zeros(*shape, dtype=dtype, device=device)
    return torch.frombuffer(anonymous_memory(count), dtype=dtype).view(*shape)


def check_fits(sinks: int, window: int, batch_size: int, nbytes: int, device: torch.device) -> None:
    """Raises MemoryError where a cache of `nbytes`, when it is full, takes more than is available on its device."""
    available = _available_bytes(device)
    if available is not None and nbytes > available:
        caches = "a cache" if batch_size == 1 else f"caches of {batch_size:,} streams"
        fewer = "" if batch_size == 1 else ", fewer streams"
        raise MemoryError(
            f"there is not enough memory for {caches} with {sinks:,} sinks and a window of {window:,}: when it is full "
            f"it takes {nbytes / 1e9:,.1f} GB, and {available / 1e9:,.1f} GB are available on {device}; give a "
            f'smaller window{fewer} or quantize="int8"'
        )


def _available_bytes(device: torch.device) -> int | None:
    """None where that is unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type == "cpu":
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in Path("/proc/meminfo").read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    return None
