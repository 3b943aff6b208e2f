"""Compiled libraries: compiled in another process, kept in a folder, found again, and compiled again if damaged."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import fx

import streamllm
from streamllm.compiled import cpu_loops, library


def graph(factor=2.0, function=operator.mul) -> fx.GraphModule:
    """x, weight -> function(x + weight, factor), x + weight. It sets the first row of x to -1."""
    result = fx.Graph()
    x, weight = result.placeholder("x"), result.placeholder("weight")
    total = result.call_method("add", (x,), {"other": weight})
    result.call_method("__setitem__", (x, (slice(None, 1), Ellipsis), -1.0))
    result.output((result.call_function(function, (total, factor)), total))
    return fx.GraphModule({}, result)


def inputs() -> list[torch.Tensor]:
    return [torch.arange(6.0).view(2, 3), torch.full((3, 2), 10.0).t()]


@pytest.fixture
def compiled(compiling, monkeypatch, tmp_path) -> list[library.Request]:
    """An empty folder for libraries. The list has the requests that were compiled."""
    requests, compile_elsewhere = [], library._compile_elsewhere

    def recording(request, path, low_priority=False):
        requests.append(request)
        compile_elsewhere(request, path)

    monkeypatch.setattr(library, "_compile_elsewhere", recording)
    monkeypatch.setenv("STREAMLLM_CACHE", str(tmp_path / "kept"))
    return requests


@pytest.fixture
def compiled_to_text(monkeypatch, tmp_path) -> list[library.Request]:
    """As `compiled`, but without a compiler: the file of a library is a text."""
    requests = []

    def writing(request, path, low_priority=False):
        requests.append(request)
        path.write_text("compiled")

    monkeypatch.setattr(library, "_compile_elsewhere", writing)
    monkeypatch.setattr(library, "Library", lambda path: path.read_text())
    monkeypatch.setattr(library, "check", lambda: None)
    monkeypatch.setenv("STREAMLLM_CACHE", str(tmp_path / "kept"))
    return requests


def test_a_compiled_graph_equals_the_graph_and_another_process_finds_it(compiled):
    """The other process needs no compiler, and loads nothing of torch's compiler."""
    results = []
    for added in (0.0, 5.0):
        x, weight = inputs()
        x += added
        wanted = graph()(*(tensor.clone() for tensor in (x, weight)))
        got = library.library(graph(), inputs(), cpu_loops.OPTIONS)([x, weight])
        assert x.tolist() == [[-1.0] * 3, [3.0 + added, 4.0 + added, 5.0 + added]]
        results.append((got, wanted))
    for got, wanted in results:  # the second call must not overwrite the results of the first
        assert [tensor.tolist() for tensor in got] == [tensor.tolist() for tensor in wanted]
    assert len(compiled) == 1
    script = (
        "import sys; from streamllm.compiled import cpu_loops, library\n"
        "from tests.unit.test_library import graph, inputs\n"
        "before = set(sys.modules)\n"
        "print(library.library(graph(), inputs(), cpu_loops.OPTIONS)(inputs())[0].tolist())\n"
        "print([name for name in sys.modules if name not in before and name.startswith('torch')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "CXX": "/bin/false"},
    )
    assert done.stdout.splitlines() == [str(results[0][1][0].tolist()), "[]"], done.stderr


@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_is_compiled_once_for_each_number_of_threads(compiled_to_text, threaded, rows):
    from tests.laws.scenarios import random_tokens, tiny_llama

    def compilations() -> int:
        model = streamllm.compile(tiny_llama.__wrapped__(layers=1), "inductor")
        cache = streamllm.SinkCache(model, 2, 3, rows)
        model(random_tokens(5, rows), cache)
        with pytest.raises(TypeError, match="not callable"), torch.inference_mode():
            model(random_tokens(1, rows), cache)
        return len(compiled_to_text)

    threaded(1)
    assert [compilations(), compilations()] == [1, 1]
    threaded(2)
    assert compilations() == 2


def test_anything_that_changes_the_library_causes_a_compilation(compiled_to_text, monkeypatch):
    def compilations(*args, options=cpu_loops.OPTIONS, examples=inputs) -> int:
        library.library(graph(*args), examples(), options)
        return len(compiled_to_text)

    assert [compilations(), compilations()] == [1, 1]
    assert compilations(3.0) == 2
    assert compilations(2.0, operator.truediv) == 3
    assert compilations(options={**cpu_loops.OPTIONS, "size_asserts": True}) == 4
    assert compilations(examples=lambda: [tensor.double() for tensor in inputs()]) == 5
    assert compilations(examples=lambda: [tensor.contiguous() for tensor in inputs()]) == 6
    changes = [
        lambda patch: patch.setattr(library, "_machine", lambda: "another one"),
        lambda patch: patch.setattr(library, "_source", lambda name: b"rewritten"),
        lambda patch: patch.setattr(torch, "__version__", "9.9"),
        lambda patch: patch.setenv("ATEN_CPU_CAPABILITY", "default"),
        lambda patch: patch.setenv("TORCHINDUCTOR_CPP_MARCH", "native"),
    ]
    for number, change in enumerate(changes, 7):
        with monkeypatch.context() as patch:
            change(patch)
            assert [compilations(), compilations()] == [number] * 2
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    assert compilations() == 11


def test_the_stride_of_a_dimension_of_size_1_does_not_matter(compiled_to_text):
    for token in (torch.zeros(1, 7)[:, 2:3], torch.zeros(1, 1), torch.zeros(5, 1)[:1]):
        library.library(graph(), [token, token], {})
    assert len(compiled_to_text) == 1


def test_the_key_depends_on_the_source_of_the_functions_in_the_graph():
    request = library.Request.of(graph(2.0, cpu_loops._matmul), inputs(), {})
    names, source = [], library._source
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_source", lambda name: names.append(name) or source(name))
        request.key()
    assert names == ["streamllm.compiled.library", "streamllm.compiled.cpu_loops"]
    assert b"def _matmul" in source("streamllm.compiled.cpu_loops")
    assert source("streamllm.nowhere") is None


@pytest.mark.parametrize("name", [library.LIBRARY_FILE, library.DIGEST_FILE])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"\xff\0")])
def test_a_damaged_library_is_compiled_again(compiled_to_text, tmp_path, name, damage):
    for compilations in (1, 2, 2):
        library.library(graph(), inputs(), {})
        assert len(compiled_to_text) == compilations
        if compilations == 1:
            (kept,) = (tmp_path / "kept").iterdir()
            damage(kept / name)


def test_without_a_writable_folder_each_use_compiles(compiled_to_text, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STREAMLLM_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        library.library(graph(), inputs(), {})
    assert len(compiled_to_text) == 2


def test_two_processes_may_compile_the_same_library(compiled_to_text, monkeypatch, tmp_path):
    compile_elsewhere = library._compile_elsewhere

    def while_another_process_compiles(request, path, low_priority=False):
        with monkeypatch.context() as patch:
            patch.setattr(library, "_compile_elsewhere", compile_elsewhere)
            library.library(graph(), inputs(), {})
        compile_elsewhere(request, path)

    with monkeypatch.context() as patch:
        patch.setattr(library, "_compile_elsewhere", while_another_process_compiles)
        assert library.library(graph(), inputs(), {}) == "compiled"
    assert len(compiled_to_text) == 2
    assert library.library(graph(), inputs(), {}) == "compiled"
    assert len(compiled_to_text) == 2
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_a_kept_library_that_cannot_be_loaded_is_compiled_again(compiled_to_text, monkeypatch, tmp_path):
    """For example in a folder shared with another system, or on a file system mounted with noexec."""

    def failing_in_the_folder(path):
        if path.is_relative_to(tmp_path):
            raise RuntimeError("Error in dlopen")
        return path.read_text()

    library.library(graph(), inputs(), {})
    monkeypatch.setattr(library, "Library", failing_in_the_folder)
    assert library.library(graph(), inputs(), {}) == "compiled"
    assert len(compiled_to_text) == 2

    def failing(path):
        raise RuntimeError("Error in dlopen")

    monkeypatch.setattr(library, "Library", failing)
    with pytest.raises(
        streamllm.CompileError, match=r"was compiled, but cannot be loaded: neither from .*kept"
    ):
        library.library(graph(), inputs(), {})


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"STREAMLLM_CACHE": "/mine", "XDG_CACHE_HOME": "/other"}, "/mine"),
        ({"XDG_CACHE_HOME": "/other"}, "/other/streamllm"),
        ({"HOME": "/home/me"}, "/home/me/.cache/streamllm"),
    ],
)
def test_the_folder_of_libraries_depends_on_environment_variables(monkeypatch, variables, wanted):
    for name in ("STREAMLLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert library.folder().as_posix() == wanted


def test_without_a_home_folder_each_use_compiles(compiled_to_text, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("STREAMLLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(library.Path, "home", no_home)
    for count in (1, 2):
        assert library.library(graph(), inputs(), {}) == "compiled"
        assert len(compiled_to_text) == count


def test_the_error_of_a_compiler_is_reported_in_one_line(compiled, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/bin/false")
    library.check()  # passes, because /bin/false exists
    with pytest.raises(streamllm.CompileError) as raised:
        library.library(graph(), inputs(), {})
    message = str(raised.value)
    assert message.startswith("the step could not be compiled (")
    assert "/bin/false" in message
    assert message.endswith('); backend="flat" needs no compiler')
    assert "Traceback" not in message
    assert "\n" not in message
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo a warning >&2; kill -9 $$", "killed by signal 9"),
        ("exit 3", "exit code 3"),
        ("echo Traceback >&2; echo ImportError: no torch >&2; exit 1", "ImportError: no torch"),
    ],
)
def test_the_failure_of_the_compiling_process_is_reported(monkeypatch, tmp_path, script, message):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("STREAMLLM_CACHE", str(tmp_path / "kept"))
    with pytest.raises(streamllm.CompileError) as raised:
        library.library(graph(), inputs(), {})
    assert f"could not be compiled ({message})" in str(raised.value)


def test_a_process_that_cannot_be_started_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("STREAMLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with pytest.raises(streamllm.CompileError, match="no process could be started to compile the step"):
        library.library(graph(), inputs(), {})


def test_an_interruption_ends_the_compiling_process_and_its_children(monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/started\nwait\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("STREAMLLM_CACHE", str(tmp_path / "kept"))
    started = tmp_path / "started"

    def interrupted(process, *args):
        while not (started.exists() and started.read_text()):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        library.library(graph(), inputs(), {})
    child = int(started.read_text())
    for _ in range(500):  # the system needs some time to end it
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.01)
    else:
        pytest.fail("the child process is still running")
    assert not (tmp_path / "kept").exists()


def test_the_compiling_process_imports_from_its_parents_path_and_not_from_the_current_folder(
    compiling, monkeypatch, tmp_path
):
    (tmp_path / "types.py").write_text("raise ImportError('from here')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(library, "_CHILD", library._CHILD.replace("main()", "sys.exit(0)"))
    with pytest.raises(FileNotFoundError):  # the replaced program exits without writing a library
        library.library(graph(), inputs(), {})


def test_without_a_compiler_compile_raises_before_the_first_token(monkeypatch):
    from tests.laws.scenarios import tiny_llama

    monkeypatch.setenv("CXX", "/nonexistent")
    with pytest.raises(
        RuntimeError, match=r"needs a C\+\+ compiler, and /nonexistent was not found: install"
    ):
        streamllm.compile(tiny_llama(layers=1), "inductor")


PARENT = """
import sys
sys.path[:0] = {path!r}
from tests.unit.test_library import graph, inputs
from streamllm.compiled import library
library.library(graph(), inputs(), {{}})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_compiling_process_ends_when_its_parent_is_killed(tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!/bin/sh\necho $$ $PPID > {tmp_path}/started\nsleep 300\n")
    compiler.chmod(0o755)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {
        **os.environ, "CXX": str(compiler), "TMPDIR": str(temporary), "STREAMLLM_CACHE": str(tmp_path / "kept"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }  # fmt: skip
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(path=[root])], env=environment)
    started = tmp_path / "started"
    for _ in range(6000):
        if started.exists() and started.read_text().split():
            break
        assert parent.poll() is None
        time.sleep(0.01)
    assert list(temporary.glob("streamllm-*"))
    parent.kill()
    parent.wait()
    processes = [int(number) for number in started.read_text().split()]
    for _ in range(1000):
        if not any(runs(process) for process in processes) and not list(temporary.glob("streamllm-*")):
            return
        time.sleep(0.01)
    pytest.fail("the compiling process, the compiler or their folder is still there")


def runs(process):
    status = Path(f"/proc/{process}/stat")
    return status.exists() and "Z" not in status.read_text().split()[2]


def test_unfinished_folders_are_swept_when_they_are_old(monkeypatch, tmp_path):
    old = time.time() - 2 * library.SWEEP_AFTER_SECONDS
    for name in ("streamllm-abcd_123", "streamllm-abcd_124", "streamllm-of-someone"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / library.LIBRARY_FILE).write_text("x")
        os.utime(tmp_path / name, (old, old))
    (tmp_path / "streamllm-abcd_125").mkdir()
    (tmp_path / "streamllm-abcd_126").write_text("x")
    (tmp_path / "outside").mkdir()
    (tmp_path / "streamllm-abcd_127").symlink_to(tmp_path / "outside")
    library._sweep(tmp_path, "streamllm-")
    kept = sorted(path.name for path in tmp_path.iterdir())
    names = ["streamllm-abcd_125", "streamllm-abcd_126", "streamllm-abcd_127", "streamllm-of-someone"]
    assert kept == ["outside", *names]
