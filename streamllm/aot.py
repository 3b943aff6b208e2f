"""library(): a graph of calls to torch as a shared library, compiled by another process and kept for the next.

A compiler leaves tens of megabytes behind that Python cannot return, and a stream may run for days. So the graph
is written down and handed to a process of its own, which compiles it with torch's AOTInductor and ends. What it
made is found again by whoever asks for the same, and is loaded at once: that takes nothing of torch's compiler.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import pkgutil
import platform
import shutil
import signal
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

from streamllm.models.cpu import described

NAME, SEAL = "step.pyd" if sys.platform == "win32" else "step.so", "sha256"
STEERS = ("ATEN_CPU_CAPABILITY", "TORCHINDUCTOR_", "AOT_INDUCTOR_")  # variables that a compiler obeys


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

    The graph gives a tuple, has neither constants nor modules, and each function in it can be imported. `options`
    are inductor's; those that this version of torch does not have are left out. Raises CompileError with the
    compiler's own words where it fails.
    """
    request = _Request.of(module, inputs, options)
    kept = _folder() / request.key()
    found = _loaded(kept)
    if found is not None:
        return found
    with tempfile.TemporaryDirectory(prefix="streamllm-", ignore_cleanup_errors=True) as making:
        made = Path(making)
        _compile_elsewhere(request, made / NAME)
        (made / SEAL).write_text(_digest(made))
        _keep(made, kept)
        found = _loaded(kept) or _loaded(made)
    if found is None:
        raise CompileError(f"{NAME} was compiled, but cannot be loaded: neither from {kept} nor from {made}")
    return found


def _loaded(folder: Path) -> Library | None:
    """The library in a folder, if it is there, as it was made, and for this machine."""
    try:
        # To load half of one ends the process.
        return Library(folder / NAME) if (folder / SEAL).read_text() == _digest(folder) else None
    except (OSError, UnicodeDecodeError, RuntimeError):
        return None


def _keep(made: Path, kept: Path) -> None:
    """Put a library where others will find it: whole, or not at all. No room and no permission cost nothing more."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".", ignore_cleanup_errors=True) as copy:
            for name in (NAME, SEAL):
                shutil.copy(made / name, copy)
            shutil.rmtree(kept, ignore_errors=True)  # what was there could not be loaded
            Path(copy).rename(kept)
    except OSError:  # or another process was faster
        return


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / NAME).read_bytes()).hexdigest()


def _folder() -> Path:
    """Where libraries are kept."""
    if os.environ.get("STREAMLLM_CACHE"):
        return Path(os.environ["STREAMLLM_CACHE"])
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamllm"
    except RuntimeError:  # nobody's home: nothing is kept
        return Path(os.devnull)


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
            [(tuple(tensor.shape), _strides(tensor), tensor.dtype) for tensor in inputs],
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
            _machine(),
        ]
        parts += [_source(name) for name in (__name__, *own)]
        parts += [
            (name, value)
            for name, value in sorted(os.environ.items())
            if name.startswith(STEERS) and name != "TORCHINDUCTOR_CACHE_DIR"  # which torch sets for itself
        ]
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


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Where there is but one of a kind, nobody strides: any number stands there."""
    return tuple(
        stride if size > 1 else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _source(module: str) -> bytes | None:
    package, _, name = module.rpartition(".")
    try:
        return pkgutil.get_data(package, f"{name}.py")
    except OSError:  # nobody has the text; then nobody changes it
        return None


@cache
def _machine() -> str:
    """What is compiled for this processor, and with these system libraries, may not run with others."""
    lines = described().splitlines()
    # Of many lines, those that stay as they are: others say how fast it runs just now.
    features = [line for line in lines if len(lines) == 1 or line.startswith(("flags", "Features"))]
    return f"{platform.system()} {platform.machine()} {platform.libc_ver()} {features}"


_CHILD = (  # which imports what its parent does, and nothing from where it is run
    "import sys; sys.path[:] = [path for path in sys.path if path]; from streamllm.aot import main; main()"
)


def _compile_elsewhere(request: _Request, library: Path) -> None:
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(library)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths}, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise CompileError(f"no process could be started to compile the step: {error}") from None
    with process:
        try:
            said = process.communicate(pickle.dumps(request))[1].decode(errors="replace").strip()
        except BaseException:  # Ctrl-C
            _kill(process)
            raise
    if process.returncode:
        _, found, reason = said.rpartition("\ntorch._inductor.exc.")  # behind the traceback
        if process.returncode < 0:
            reason = f"killed by signal {-process.returncode}"
        elif not found:
            reason = said.rpartition("\n")[2] or f"exit code {process.returncode}"
        reason = " ".join(reason.split())[:2000]
        raise CompileError(f'the step could not be compiled ({reason}); backend="flat" needs no compiler')


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process, and the compilers that it has started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def main() -> None:
    """What the other process does."""
    from torch._inductor import aot_compile, config

    request = pickle.load(sys.stdin.buffer)
    module, inputs = request.graph()
    known = config.get_config_copy()
    options = {name: value for name, value in request.options.items() if name in known}
    aot_compile(module, inputs, options={**options, "aot_inductor.output_path": sys.argv[1]})
