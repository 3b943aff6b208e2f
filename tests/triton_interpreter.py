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


def mutant(folder: Path, before: str, after: str) -> ModuleType:
    """The kernels with a fault: every `before` in their source replaced by `after`."""
    source = Path(str(triton_kernels.__file__)).read_text(encoding="utf-8")
    assert before in source, before
    path = folder / "mutant_kernels.py"
    path.write_text(source.replace(before, after), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mutant_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


__all__ = ["mutant", "triton_kernels", "triton_launch"]
