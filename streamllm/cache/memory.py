"""The memory of a cache, which a CPU takes as the cache fills."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

LAZY_BYTES = 1 << 16  # smaller tensors come from torch's allocator


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.zeros. On a CPU the system gives each page of memory only when it is first written.

    So a short stream with a long window takes the memory of its own tokens. An accelerator gives all at once, because
    recorded steps keep addresses.
    """
    count = dtype.itemsize
    for size in shape:
        count *= size
    if device.type != "cpu" or count < LAZY_BYTES:
        return torch.zeros(*shape, dtype=dtype, device=device)
    if os.name == "posix":
        memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        memory = mmap.mmap(-1, count)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


def does_not_fit(sinks: int, window: int, batch_size: int, nbytes: int, device: torch.device) -> MemoryError:
    """The error for a cache that the memory of its device cannot hold when it is full."""
    streams = "" if batch_size == 1 else f" of {batch_size} streams"
    return MemoryError(
        f"a cache{streams} with {sinks:,} sinks and a window of {window:,} takes {nbytes / 1e9:,.1f} GB when it is "
        f'full, which does not fit on {device}: give a smaller window, fewer streams, or quantize="int8"'
    )


def physical_memory() -> int | None:
    """Bytes of memory that this machine has. None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
