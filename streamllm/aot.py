"""library(): a graph of calls to torch as a shared library, compiled by another process and kept for the next.

A compiler leaves tens of megabytes behind that Python cannot return, and a stream may run for days. So the graph
is written down and handed to a process of its own, which compiles it with torch's AOTInductor and ends. What it
made is found again by whoever asks for the same, and is loaded without a compiler: it needs none of torch's
Python but what is there anyway.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import pkgutil
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

NAME, SEAL = "step.so", "sha256"


class CompileError(RuntimeError):
    """What inductor was to compile cannot be compiled here."""


def check() -> None:
    """Raises CompileError where there is no C++ compiler."""
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if shutil.which(compiler) is None:
        raise CompileError(
            f'backend="inductor" needs a C++ compiler, and {compiler} was not found: install g++ or clang, '
            f'or name one in the variable CXX, or use backend="flat"'
        )


class Library:
    """A graph that was compiled: called with a list of tensors like those it was compiled for, as the graph is."""

    def __init__(self, path: Path) -> None:
        self._runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)

    def __call__(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        # What is small is made on the stack, and handed over where the next call's result will stand.
        return tuple(result.clone() for result in self._runner.run(inputs))


def library(module: fx.GraphModule, inputs: Sequence[Tensor], options: Mapping[str, Any]) -> Library:
    """The graph, compiled for inputs of these sizes, strides and types on a CPU: as it lies kept, or new.

    The graph gives a tuple, has neither constants nor modules, and each function in it can be imported. `options` are
    inductor's; those that this version of torch does not have are left out. Raises CompileError with the
    compiler's own words where it fails.
    """
    request = _Request.of(module, inputs, options)
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / request.key()
        if kept.exists():
            if _whole(kept):
                return Library(kept / NAME)
            shutil.rmtree(kept)
        making = tempfile.TemporaryDirectory(dir=folder, prefix=".", ignore_cleanup_errors=True)
    except OSError:  # nothing can be kept there
        making = tempfile.TemporaryDirectory(prefix="streamllm-", ignore_cleanup_errors=True)
        kept = Path(making.name) / "kept"
    with making:
        made = Path(making.name) / "made"
        _compile_elsewhere(request, made)
        (made / SEAL).write_text(_digest(made))
        try:
            made.rename(kept)  # whole, or not at all
        except OSError:  # another process was faster
            kept = made
        return Library(kept / NAME)


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / NAME).read_bytes()).hexdigest()


def _whole(folder: Path) -> bool:
    """Whether a library is as it was made: to load half of one ends the process."""
    try:
        return (folder / SEAL).read_text() == _digest(folder)
    except (OSError, UnicodeDecodeError):
        return False


def _folder() -> Path:
    """Where libraries are kept."""
    if os.environ.get("STREAMLLM_CACHE"):
        return Path(os.environ["STREAMLLM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "streamllm"


@dataclass(frozen=True)
class _At:
    """In the place of a node of the graph: its number."""

    number: int


@dataclass(frozen=True)
class _Request:
    """A graph in a form that can be sent."""

    code: str  # for whoever compares
    nodes: list[tuple[str, Any, Any, Any]]  # op, target, arguments
    inputs: list[tuple[Any, ...]]  # sizes, strides, type
    options: dict[str, Any]

    @staticmethod
    def of(module: fx.GraphModule, inputs: Sequence[Tensor], options: Mapping[str, Any]) -> _Request:
        numbers = {node: _At(number) for number, node in enumerate(module.graph.nodes)}

        def sent(argument: Any) -> Any:
            return numbers[argument] if isinstance(argument, fx.Node) else argument

        return _Request(
            module.code,
            [
                (node.op, node.target, *fx.node.map_aggregate((node.args, node.kwargs), sent))
                for node in numbers
            ],
            [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in inputs],
            dict(options),
        )

    def key(self) -> str:
        """A name for all that the library depends on."""
        functions = {target.__module__ for op, target, *_ in self.nodes if op == "call_function"}
        own = sorted(name for name in functions if name and name.startswith("streamllm."))
        parts: list[Any] = [
            self.code,
            self.inputs,
            sorted(self.options.items()),
            torch.__version__,
            _processor(),
        ]
        parts += [_source(name) for name in (__name__, *own)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def graph(self) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
        """The graph again, and tensors like the inputs."""
        graph, made = fx.Graph(), list[fx.Node]()
        for op, target, args, kwargs in self.nodes:
            args, kwargs = fx.node.map_aggregate(
                (args, kwargs), lambda value: made[value.number] if isinstance(value, _At) else value
            )
            if op == "output":
                graph.output(args[0])
            else:
                made.append(graph.create_node(op, target, args, kwargs))
        with torch._subclasses.FakeTensorMode():
            inputs = [torch.empty_strided(size, stride, dtype=dtype) for size, stride, dtype in self.inputs]
        return fx.GraphModule(nn.Module(), graph), tuple(inputs)


def _source(module: str) -> bytes | None:
    package, _, name = module.rpartition(".")
    try:
        return pkgutil.get_data(package, f"{name}.py")
    except OSError:  # nobody has the text; then nobody changes it
        return None


@cache
def _processor() -> str:
    """What is compiled for this processor may not run on another one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    return f"{platform.system()} {platform.machine()} {features}"


def _compile_elsewhere(request: _Request, folder: Path) -> None:
    command = [sys.executable, "-c", "from streamllm.aot import main; main()", str(folder)]
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        command, input=pickle.dumps(request), capture_output=True, env={**os.environ, "PYTHONPATH": paths}
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        _, ours, words = said.rpartition("\ntorch._inductor.exc.")  # behind the traceback
        reason = words if ours else said.rpartition("\n")[2] or f"exit code {done.returncode}"
        reason = " ".join(reason.split())[:2000]
        raise CompileError(f'the step could not be compiled ({reason}); backend="flat" needs no compiler')


def main() -> None:
    """What the other process does."""
    from torch._inductor import aot_compile, config

    request = pickle.load(sys.stdin.buffer)
    module, inputs = request.graph()
    known = config.get_config_copy()
    options = {name: value for name, value in request.options.items() if name in known}
    path = str(Path(sys.argv[1]) / NAME)
    aot_compile(module, inputs, options={**options, "aot_inductor.output_path": path})
