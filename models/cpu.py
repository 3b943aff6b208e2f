"""What the CPU at hand reads fastest depends on who made it: Intel's own library is part of torch."""

from __future__ import annotations

import platform
from functools import cache
from itertools import takewhile

import torch


@cache
def described() -> str:
    """What the system says of the first processor: on Linux, lines of names and values; else a name, or nothing."""
    try:
        with open("/proc/cpuinfo") as lines:
            return "".join(
                takewhile(str.strip, lines)
            )  # then come the others, of which there may be hundreds
    except OSError:
        return platform.processor()


def _by_intel() -> bool:
    """Whether torch has Intel's kernels for matrices (MKL), and the processor is one of Intel's."""
    return torch.backends.mkl.is_available() and "GenuineIntel" in described()  # type: ignore[no-untyped-call]


INTEL = _by_intel()
