"""What the CPU at hand reads fastest depends on who made it: Intel's own library is part of torch."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def _by_intel() -> bool:
    """Whether torch has Intel's kernels for matrices (MKL), and the processor is one of Intel's."""
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        who = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        who = platform.processor()
    return "GenuineIntel" in who


INTEL = _by_intel()
