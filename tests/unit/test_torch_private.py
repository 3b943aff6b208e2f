"""Functions that torch does not promise to keep: without any of them, a forward gives the same logits."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from streamllm.models import torch_private

ROOT = Path(__file__).resolve().parents[2]
HIDE = """
import json, sys, torch

path = sys.argv[1]
owner = torch
*names, last = [name for name in path.split(".") if name != "default"]
for name in names:
    owner = getattr(owner, name)


class Hidden:
    def __getattr__(self, name):
        if name == last:
            raise AttributeError(f"{path} is hidden")
        return getattr(owner, name)


if path:
    getattr(owner, last)  # it is there
    if names[:1] == ["ops"]:  # torch.ops would make it again
        setattr(torch.ops, names[1], Hidden())
    else:
        delattr(owner, last)
"""
FORWARD = (
    HIDE
    + """
import streamllm
from streamllm.models import linear, torch_private
from tests.laws.scenarios import random_tokens, tiny_llama

hidden = [name for name in torch_private.__all__ if getattr(torch_private, name) is None]
results = []
for dtype, quantize in ((torch.float32, ""), (torch.bfloat16, ""), (torch.bfloat16, "int8"), (torch.bfloat16, "int4")):
    model = tiny_llama.__wrapped__(dtype=dtype, windows=(9, 9, 9), mlp_width=96)
    linear.arrange(model)
    if quantize:
        linear.quantize(model, quantize)
    cache = streamllm.SinkCache(model, 2, 6)
    for length in (30, 1, 1):
        logits = model(random_tokens(length), cache)
    results.append(logits[0, -1].tolist())
    results.append(model(random_tokens(30))[0, -1].tolist())
try:
    streamllm.compile(tiny_llama(), "inductor")
    compiles = True
except streamllm.CompileError as error:
    compiles = "flat" in str(error) and False
print(json.dumps([hidden, compiles, results]))
"""
)


def paths() -> list[str]:
    """The path of each function below torch, as models/torch_private.py looks it up."""
    tree = ast.parse((ROOT / "models" / "torch_private.py").read_text())
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_find"
    ]
    return [call.args[0].value for call in calls]


def forward_without(path: str) -> tuple[list[str], bool, list[list[float]]]:
    done = subprocess.run(
        [sys.executable, "-c", FORWARD, path], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return tuple(json.loads(done.stdout))


@pytest.fixture(scope="module")
def with_all() -> tuple[list[str], bool, list[list[float]]]:
    return forward_without("")


@pytest.mark.parametrize("path", paths())
def test_a_forward_without_it_gives_the_same_logits(with_all, path: str) -> None:
    hidden, compiles, results = forward_without(path)
    is_for_cuda = path.endswith("_flash_attention_forward.default") and "flash_attention_cuda" in with_all[0]
    assert len(hidden) == len(with_all[0]) + (not is_for_cuda)  # without CUDA, that one is hidden already
    if path.endswith(("AOTIModelContainerRunnerCpu", "FakeTensorMode")):
        assert compiles is False
    for got, wanted, allowed in zip(results, with_all[2], [1e-4] * 2 + [0.1] * 6, strict=True):
        spread = max(wanted) - min(wanted)
        assert max(abs(a - b) for a, b in zip(got, wanted, strict=True)) <= allowed * spread


def test_private_functions_are_looked_up_in_one_file() -> None:
    """No other file of the package names an attribute of torch that begins with an underscore."""
    found = []
    for room in ("models", "weights", "streamllm"):
        for path in sorted((ROOT / room).rglob("*.py")):
            if path.name == "torch_private.py":
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
                parts = text.split(".") if "(" not in text else [""]
                if parts[0] == "torch" and any(
                    part.startswith("_") and not part.startswith("__") for part in parts[1:]
                ):
                    found.append(f"{path.relative_to(ROOT)}: {text}")
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch._"):
                    found.append(f"{path.relative_to(ROOT)}: {node.module}")
    assert found == []


def test_the_list_is_complete() -> None:
    assert len(torch_private.__all__) == len(paths()) + 1  # inductor is a function
