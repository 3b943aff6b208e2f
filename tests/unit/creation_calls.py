"""Finds calls that make a tensor without saying its type and device: these would depend on process-wide defaults."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

# Functions of torch that take their type or device from a process-wide default, unless both are given.
CREATORS = frozenset(
    ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "randperm", "linspace",
     "logspace", "eye", "empty_strided", "scalar_tensor", "tril_indices", "triu_indices", "hann_window")
)  # fmt: skip


def unspecified(path: Path) -> Iterator[str]:
    """`file:line: what is missing`, for each call in a file without `dtype=` or `device=`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = node.func.value, node.func.attr
        if not isinstance(owner, ast.Name) or owner.id != "torch":
            continue
        given = {keyword.arg for keyword in node.keywords}
        missing = [] if name not in CREATORS else sorted({"dtype", "device"} - given)
        if name == "Generator" and not node.args and "device" not in given:
            missing = ["device"]
        if missing:
            yield f"{path.name}:{node.lineno}: torch.{name} without {' and '.join(missing)}"
