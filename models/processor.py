"""The processor at hand: which library's kernels are the fastest depends on who made it."""

from __future__ import annotations

import platform
from functools import cache
from itertools import takewhile

import torch


@cache
def description() -> str:
    """The first processor in the system's words: on Linux lines of names and values, else a name or nothing."""
    try:
        with open("/proc/cpuinfo") as lines:
            return "".join(takewhile(str.strip, lines))  # the other processors follow after an empty line
    except OSError:
        return platform.processor()


def _is_intel() -> bool:
    """Whether the processor is Intel's and torch has Intel's matrix kernels (MKL)."""
    return torch.backends.mkl.is_available() and "GenuineIntel" in description()  # type: ignore[no-untyped-call]


IS_INTEL = _is_intel()
