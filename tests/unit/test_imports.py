"""The folders models, weights and streamllm import one another in one direction only, without cycles.

Importing the package does not change torch.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"models": "streamllm.models", "weights": "streamllm.weights", "streamllm": "streamllm"}
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]

# The packages of the project that a folder may import, besides its own.
ALLOWED = {
    "models": (),
    "weights": ("streamllm.models",),
    "streamllm": ("streamllm.models", "streamllm.weights"),
}


def folder_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def module_of(path: Path) -> str:
    folder, *inner = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *(part for part in inner if part != "__init__")])


def imports(path: Path) -> list[tuple[str, bool]]:
    """The full name of every module that a file imports, and whether importing the file imports it.

    False: it is imported inside a function, or for type checkers only.
    """
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            inner = [f"{name}.{alias.name}" for alias in node.names if name in PACKAGES]
            # "from package import module" counts as an import of the module, not of the package.
            if not inner or not MODULES.issuperset(inner):
                found.append((name, at_import))
            found.extend((module, at_import) for module in inner)
        later = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        for child in ast.iter_child_nodes(node):
            visit(child, at_import and not later)

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


MODULES = {module_of(path) for path in FILES}
PACKAGES = {module_of(path) for path in FILES if path.name == "__init__.py"}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_imports_of_all_kinds_are_found() -> None:
    found = dict(imports(ROOT / "streamllm" / "loading.py"))
    assert found["streamllm.weights.checkpoint"] is True
    assert found["tqdm"] is False
    assert "streamllm.cache.ring" in dict(imports(ROOT / "streamllm" / "cache" / "rolling_cache.py"))
    assert dict(imports(ROOT / "streamllm" / "__init__.py"))["streamllm.cache"] is False
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_imports_only_the_folders_below_it(path: Path) -> None:
    folder = folder_of(path)
    own = FOLDERS[folder]
    for name, _ in imports(path):
        top = name.split(".")[0]
        if top == "streamllm":
            inner = next(
                (package for package in ("streamllm.models", "streamllm.weights") if within(name, package)),
                "streamllm",
            )
            allowed = inner == own or inner in ALLOWED[folder]
            assert allowed, f"{path.relative_to(ROOT)} imports {name}"
        elif folder == "models":
            standard = top in sys.stdlib_module_names
            assert standard or top == "torch", f"{path.relative_to(ROOT)} imports {name}"
        assert top not in ("tools", "tests"), f"{path.relative_to(ROOT)} imports {name}"


def test_imports_have_no_cycles() -> None:
    modules = {module_of(path): path for path in FILES}
    graph = {
        module: {
            name for name, at_import in imports(path) if at_import and name in modules and name != module
        }
        for module, path in modules.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_transformers_is_imported_by_one_function() -> None:
    users = {
        path.relative_to(ROOT).as_posix(): at_import
        for path in FILES
        for name, at_import in imports(path)
        if within(name, "transformers")
    }
    assert set(users) == {"streamllm/parity/reference.py"}
    assert not any(users.values())


PROBE = '''
import importlib, inspect, sys
import torch, torch.nn.functional as F


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "matplotlib", "pytest"):
            raise ImportError(f"{name} is not a dependency of the package")


def contents():
    """The id of every public function and class of torch."""
    owners = [torch, torch.nn, F, torch.Tensor, torch.nn.Module, torch.nn.Linear, torch.nn.Embedding]
    owners += [value for _, value in inspect.getmembers(torch.nn, inspect.isclass)]
    return {
        (repr(owner), name): id(value)
        for owner in owners
        for name, value in vars(owner).items()
        if callable(value) and not name.startswith("_C")
    }


before = contents()
sys.meta_path.insert(0, Blocked())
for name in sys.argv[2:]:
    importlib.import_module(name)
import streamllm
model, tokenizer = streamllm.load(sys.argv[1], device="cpu")
text = "".join(streamllm.Stream(model, tokenizer).generate("one two", max_new_tokens=5, temperature=1.0))
after = contents()
changed = [key for key in before if after.get(key) != before[key]]
assert not changed, changed
assert len(before) > 1000
assert not any(name.split(".")[0] == "transformers" for name in sys.modules)
print("unchanged")
'''


def test_everything_runs_without_transformers_and_leaves_torch_alone(checkpoint: Path) -> None:
    modules = [module_of(path) for path in FILES if path.name != "__main__.py"]
    if find_spec("triton") is None:  # they are imported on CUDA only
        modules = [name for name in modules if not name.startswith("streamllm.compiled.triton_")]
    command = [sys.executable, "-c", PROBE, str(checkpoint), *modules]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=checkpoint)
    assert result.stdout == "unchanged\n", result.stderr[-2000:]
