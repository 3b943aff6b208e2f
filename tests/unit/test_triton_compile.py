"""Every Triton kernel compiles for the GPUs that it is meant for, with the tiles it is launched with. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux, x86-64)")

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that one program may have


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_kernels_compile(capability, tmp_path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.triton_launches", str(capability)]
    if capability != 90:
        command.append("--few")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["kernel"] for one in made} == {
        "matvec", "matmul_rows", "norm_rows", "gate_rows", "rope_tables", "attention", "rotate_heads",
        "join_sinks", "int4 matvec", "int4 matmul_rows",
    }  # fmt: skip
    assert all(one["cubin"] > 0 and one["shared"] <= SHARED_MEMORY[capability] for one in made)
