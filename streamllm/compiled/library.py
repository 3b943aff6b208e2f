"""library(): a graph as a shared library, compiled by torch's AOTInductor in another process and kept on disk.

A compiler leaves tens of megabytes in its process that Python cannot free, and a stream may run for days. So
another process compiles the graph and ends. A later request for the same graph loads the library from disk,
without torch's compiler.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import pkgutil
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from streamllm.models import processor, torch_private
from streamllm.weights.errors import shorten

MAX_REASON_CHARACTERS = 2000  # of a compiler's message in an error
LIBRARY_FILE, DIGEST_FILE = "step.pyd" if sys.platform == "win32" else "step.so", "sha256"
MAX_KEPT_LIBRARIES = 64  # of 1 to 3 MB each
LIBRARY_FOLDER = re.compile("[0-9a-f]{32}")
# Unfinished folders this old belong to processes that were killed. Compiling takes a minute, not an hour.
SWEEP_AFTER_SECONDS = 3600
TEMPORARY_PREFIX = "streamllm-compile-"
# Environment variables that change what the compiler produces, by their prefixes.
COMPILER_VARIABLES = ("ATEN_CPU_CAPABILITY", "TORCHINDUCTOR_", "AOT_INDUCTOR_")


class CompileError(RuntimeError):
    """A step could not be compiled."""


def check() -> None:
    """Raises CompileError where there is no C++ compiler, or torch cannot load what it compiles."""
    if torch_private.aoti_runner_cpu is None or torch_private.fake_tensor_mode is None:
        raise CompileError(
            f'backend="inductor" needs a torch that loads compiled libraries, and {torch.__version__} does not: '
            f'use backend="flat", or another version of torch'
        )
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if shutil.which(compiler) is None:
        raise CompileError(
            f'backend="inductor" needs a C++ compiler, and {compiler} was not found: install g++ or clang, '
            f'or name one in the variable CXX, or use backend="flat"'
        )


class Library:
    """A compiled graph. Call it with a list of tensors like those that it was compiled for."""

    def __init__(self, path: Path) -> None:
        assert torch_private.aoti_runner_cpu is not None  # see `check`
        self._runner = torch_private.aoti_runner_cpu(str(path), 1)

    def __call__(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        # Small results are on the stack of the library, where the next call overwrites them.
        return tuple(result.clone() for result in self._runner.run(inputs))


def library(module: fx.GraphModule, inputs: Sequence[Tensor], options: Mapping[str, Any]) -> Library:
    """The graph, compiled for inputs of these sizes, strides and types on a CPU; from disk where it is kept.

    The graph returns a tuple, has neither constants nor modules, and each function in it can be imported. `options`
    are inductor's; those unknown to this version of torch are left out. Raises CompileError with the compiler's
    own message where compiling fails.
    """
    request = Request.of(module, inputs, options)
    return kept(request) or compiled(request)


def kept(request: Request) -> Library | None:
    """The library of a request, where an earlier process has kept it."""
    return _loaded(folder() / request.key())


def compiled(request: Request, low_priority: bool = False) -> Library:
    """Compile a request in another process, and keep the library. Raises CompileError."""
    place = folder() / request.key()
    _sweep(Path(tempfile.gettempdir()), TEMPORARY_PREFIX)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, ignore_cleanup_errors=True) as making:
        made = Path(making)
        _compile_elsewhere(request, made / LIBRARY_FILE, low_priority)
        (made / DIGEST_FILE).write_text(_digest(made))
        _keep(made, place)
        found = _loaded(place) or _loaded(made)
    if found is None:
        raise CompileError(
            f"{LIBRARY_FILE} was compiled, but cannot be loaded: neither from {place} nor from {made}"
        )
    return found


def _loaded(folder: Path) -> Library | None:
    """The library in a folder, if it is there, complete, and can be loaded."""
    try:
        # Loading a truncated library would end the process.
        if (folder / DIGEST_FILE).read_text() != _digest(folder):
            return None
        with contextlib.suppress(OSError):  # a read-only folder
            os.utime(folder)  # used now, see `_drop_oldest`
        return Library(folder / LIBRARY_FILE)
    except (OSError, UnicodeDecodeError, RuntimeError):
        return None


def _keep(made: Path, kept: Path) -> None:
    """Store a library for later processes, completely or not at all. A full or read-only disk is no error."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        _sweep(kept.parent, ".")
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".", ignore_cleanup_errors=True) as copy:
            for name in (LIBRARY_FILE, DIGEST_FILE):
                shutil.copy(made / name, copy)
            if _loaded(kept) is None:  # or another process was faster
                shutil.rmtree(kept, ignore_errors=True)
                Path(copy).rename(kept)
        _drop_oldest(kept.parent)
    except OSError:
        return


def _drop_oldest(folder: Path) -> None:
    """Delete the libraries that were used least recently, until MAX_KEPT_LIBRARIES are left."""
    found = [path for path in folder.iterdir() if LIBRARY_FOLDER.fullmatch(path.name)]
    for path in sorted(found, key=lambda path: path.stat().st_mtime)[
        : max(0, len(found) - MAX_KEPT_LIBRARIES)
    ]:
        shutil.rmtree(path, ignore_errors=True)


def _sweep(folder: Path, prefix: str) -> None:
    """Delete this user's old temporary folders, which processes that were killed have left behind."""
    oldest = time.time() - SWEEP_AFTER_SECONDS
    made_by_tempfile = re.compile(re.escape(prefix) + "[a-z0-9_]{8}")
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if not made_by_tempfile.fullmatch(entry.name) or not entry.is_dir(follow_symlinks=False):
                continue
            with contextlib.suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                is_ours = not hasattr(os, "getuid") or found.st_uid == os.getuid()
                if is_ours and found.st_mtime < oldest:
                    shutil.rmtree(entry, ignore_errors=True)


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / LIBRARY_FILE).read_bytes()).hexdigest()


def folder() -> Path:
    """The folder in which libraries are kept."""
    if os.environ.get("STREAMLLM_CACHE"):
        return Path(os.environ["STREAMLLM_CACHE"])
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamllm"
    except RuntimeError:  # there is no home directory: keep nothing
        return Path(os.devnull)


@dataclass(frozen=True)
class _NodeRef:
    """Stands for a node of the graph: its number."""

    number: int


@dataclass(frozen=True)
class Request:
    """A graph to compile, in a form that can be pickled."""

    code: str  # the graph as source text, for the key
    nodes: list[tuple[str, Any, Any, Any]]  # op, target, arguments
    inputs: list[tuple[Any, ...]]  # sizes, strides, type
    options: dict[str, Any]

    @staticmethod
    def of(module: fx.GraphModule, inputs: Sequence[Tensor], options: Mapping[str, Any]) -> Request:
        numbers = {node: _NodeRef(number) for number, node in enumerate(module.graph.nodes)}

        def by_number(argument: Any) -> Any:
            return numbers[argument] if isinstance(argument, fx.Node) else argument

        return Request(
            module.code,
            [
                (node.op, node.target, *fx.node.map_aggregate((node.args, node.kwargs), by_number))
                for node in numbers
            ],
            [(tuple(tensor.shape), _strides(tensor), tensor.dtype) for tensor in inputs],
            dict(options),
        )

    def key(self) -> str:
        """A hash of everything that the library depends on."""
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
            if name.startswith(COMPILER_VARIABLES)
            and name != "TORCHINDUCTOR_CACHE_DIR"  # torch sets it itself
        ]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def graph(self) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
        """The graph rebuilt, and fake tensors like the inputs."""
        graph, made = fx.Graph(), list[fx.Node]()
        for op, target, args, kwargs in self.nodes:
            args, kwargs = fx.node.map_aggregate(
                (args, kwargs), lambda value: made[value.number] if isinstance(value, _NodeRef) else value
            )
            if op == "output":
                graph.output(args[0])
            else:
                made.append(graph.create_node(op, target, args, kwargs))
        assert torch_private.fake_tensor_mode is not None  # see `check`
        with torch_private.fake_tensor_mode():
            inputs = [
                torch.empty_strided(size, stride, dtype=dtype, device="cpu")
                for size, stride, dtype in self.inputs
            ]
        return fx.GraphModule(nn.Module(), graph), tuple(inputs)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides, with 1 for dimensions of size 1: there, the stride is irrelevant."""
    return tuple(
        stride if size > 1 else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _source(module: str) -> bytes | None:
    package, _, name = module.rpartition(".")
    try:
        return pkgutil.get_data(package, f"{name}.py")
    except OSError:  # installed without source, so it does not change either
        return None


@cache
def _machine() -> str:
    """The processor and the C library that a compiled library depends on."""
    lines = processor.description().splitlines()
    # Of many lines, take those that do not change over time, as the clock frequency does.
    features = [line for line in lines if len(lines) == 1 or line.startswith(("flags", "Features"))]
    return f"{platform.system()} {platform.machine()} {platform.libc_ver()} {features}"


# The child imports from the same places as its parent, but not from the working directory.
_CHILD = (
    "import sys; sys.path[:] = [path for path in sys.path if path]\n"
    "from streamllm.compiled.library import main; main()"
)


_CAN_PASS_PIPES = os.name == "posix"


def _compile_elsewhere(request: Request, library: Path, low_priority: bool = False) -> None:
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    # Only this process holds the writing end. When it ends, however it ends, the child reads the end of the file.
    alive, held = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(library), str(int(low_priority)),
             *([str(alive)] if _CAN_PASS_PIPES else [])],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths}, start_new_session=True,
            pass_fds=(alive,) if _CAN_PASS_PIPES else (),
        )  # fmt: skip
        with process:
            try:
                output = process.communicate(pickle.dumps(request))[1].decode(errors="replace").strip()
            except BaseException:  # Ctrl-C
                _kill(process)
                raise
    except OSError as error:
        raise CompileError(f"no process could be started to compile the step: {error}") from None
    finally:
        os.close(alive)
        os.close(held)
    if process.returncode:
        _, found, reason = output.rpartition("\ntorch._inductor.exc.")  # after the traceback
        if process.returncode < 0:
            reason = f"killed by signal {-process.returncode}"
        elif not found:
            reason = output.rpartition("\n")[2] or f"exit code {process.returncode}"
        reason = shorten(" ".join(reason.split()), MAX_REASON_CHARACTERS)
        raise CompileError(f'the step could not be compiled ({reason}); backend="flat" needs no compiler')


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and the compilers that it has started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _end_with_parent(alive: int, folder: Path) -> None:
    """When the parent is gone, end the compilers, delete the folder and end this process."""
    os.read(alive, 1)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """The other process: compile the request on standard input to the file in argv[1].

    argv[2]: 1 for low priority. argv[3]: the reading end of a pipe that closes with the parent.
    """
    inductor = torch_private.inductor()
    if inductor is None:
        sys.exit(f"torch {torch.__version__} has no inductor")
    if sys.argv[2] == "1" and hasattr(os, "nice"):
        os.nice(19)
    if len(sys.argv) > 3:
        threading.Thread(
            target=_end_with_parent, args=(int(sys.argv[3]), Path(sys.argv[1]).parent), daemon=True
        ).start()
    request = pickle.load(sys.stdin.buffer)
    module, inputs = request.graph()
    known = inductor.config.get_config_copy()
    options = {name: value for name, value in request.options.items() if name in known}
    inductor.aot_compile(module, inputs, options={**options, "aot_inductor.output_path": sys.argv[1]})
