"""Triton's interpreter for tests: kernels run on the CPU, program by program. Skips where Triton is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux, x86-64)")
from streamllm.compiled import triton_kernels, triton_launch

if type(triton_kernels.matvec).__name__ != "InterpretedFunction":
    pytest.skip("TRITON_INTERPRET=1 was not set when Triton was imported", allow_module_level=True)


def mutant(folder: Path, original: ModuleType, before: str, after: str) -> ModuleType | None:
    """The kernels of a module with a fault: every `before` in its source replaced by `after`; None without one."""
    source = Path(str(original.__file__)).read_text(encoding="utf-8")
    if before not in source:
        return None
    path = folder / "mutant_kernels.py"
    path.write_text(source.replace(before, after), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mutant_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


__all__ = ["mutant", "triton_kernels", "triton_launch"]
