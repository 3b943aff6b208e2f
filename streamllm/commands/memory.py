"""Whether a cache fits into memory, before it is allocated."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def check_cache_fits(
    model: nn.Module, sinks: int, window: int | None, quantize: str | None = None, streams: int = 1
) -> None:
    """Raises ValueError, with both sizes, if the caches of `streams` take more memory than is available.

    window: None is the default window, which is small.
    """
    if window is None:
        return

    from streamllm.models.step import geometry_of

    geometry = geometry_of(model)
    parameter: Any = next(model.parameters())
    itemsize = 1 if quantize else parameter.element_size()
    places = sum(sinks + min(window, own or window) for own in geometry.windows)
    needed = 2 * geometry.kv_heads * geometry.head_dim * itemsize * places * streams
    available = _available_bytes(parameter.device)
    if available is not None and needed > available:
        raise ValueError(
            f"there is not enough memory for {'a cache' if streams == 1 else f'{streams} caches'} of {sinks} sinks and "
            f"{window:,} recent tokens: it takes {needed / 1e9:,.1f} GB, and {available / 1e9:,.1f} GB are available; "
            f"give a smaller --window{'' if streams == 1 else ', or fewer --slots'}"
        )


def _available_bytes(device: Any) -> int | None:
    """The memory that is available on a device; None where that is unknown."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
