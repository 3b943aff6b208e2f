"""What the machine is, and how busy it is."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from pathlib import Path
from typing import Any


def cores_in_use(seconds: float = 1.0) -> float:
    """Cores that other processes use while this one sleeps; 0 where there is no /proc/stat."""

    def ticks() -> tuple[int, int]:
        """All ticks of all cores, and those that were idle."""
        values = [int(value) for value in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(values), values[3] + values[4]

    try:
        all_before, idle_before = ticks()
        time.sleep(seconds)
        all_after, idle_after = ticks()
    except (OSError, ValueError):
        return 0.0
    share = 1 - (idle_after - idle_before) / max(1, all_after - all_before)
    return share * (os.cpu_count() or 1)


def describe() -> dict[str, Any]:
    """Processor, cores, torch and GPU; "others": the cores that other processes use."""
    import torch

    name = platform.processor()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "others": round(cores_in_use(), 2),
    }
