"""Compiled elsewhere: kept, found again by who asks for the same, made anew where it is broken."""

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
    """given, weight -> (given + weight) times a factor; given counts on."""
    made = fx.Graph()
    given, weight = made.placeholder("given"), made.placeholder("weight")
    total = made.call_method("add", (given,), {"other": weight})
    made.call_method("__setitem__", (given, (slice(None, 1), Ellipsis), -1.0))
    made.output((made.call_function(function, (total, factor)), total))
    return fx.GraphModule({}, made)


def inputs() -> list[torch.Tensor]:
    return [torch.arange(6.0).view(2, 3), torch.full((3, 2), 10.0).t()]


@pytest.fixture
def compiled(compiling, monkeypatch, tmp_path) -> list[library._Request]:
    """What had to be compiled, in an empty folder of one's own."""
    requests, compile_elsewhere = [], library._compile_elsewhere

    def counted(request, path):
        requests.append(request)
        compile_elsewhere(request, path)

    monkeypatch.setattr(library, "_compile_elsewhere", counted)
    monkeypatch.setenv("STREAMLLM_CACHE", str(tmp_path / "kept"))
    return requests


@pytest.fixture
def quick(monkeypatch, tmp_path) -> list[library._Request]:
    """As `compiled`, without a compiler: a library is a text."""
    requests = []

    def written(request, path):
        requests.append(request)
        path.write_text("compiled")

    monkeypatch.setattr(library, "_compile_elsewhere", written)
    monkeypatch.setattr(library, "Library", lambda path: path.read_text())
    monkeypatch.setattr(library, "check", lambda: None)
    monkeypatch.setenv("STREAMLLM_CACHE", str(tmp_path / "kept"))
    return requests


def test_a_graph_that_is_compiled_is_the_graph_and_is_kept(compiled):
    """And a process that finds it needs no compiler, nor anything of cpu_loops."""
    results = []
    for more in (0.0, 5.0):
        given, weight = inputs()
        given += more
        wanted = graph()(*(tensor.clone() for tensor in (given, weight)))
        got = library.library(graph(), inputs(), cpu_loops.OPTIONS)([given, weight])
        assert given.tolist() == [[-1.0] * 3, [3.0 + more, 4.0 + more, 5.0 + more]]
        results.append((got, wanted))
    for got, wanted in results:  # the first one, too, is still what it was
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
def test_a_step_is_found_again_and_for_as_many_threads_only(quick, threaded, rows):
    from tests.laws.scenarios import random_tokens, tiny_llama

    def ask() -> int:
        model = streamllm.compile(tiny_llama.__wrapped__(layers=1), "inductor")
        cache = streamllm.SinkCache(model, 2, 3, rows)
        model(random_tokens(5, rows), cache)
        with pytest.raises(TypeError, match="not callable"), torch.inference_mode():
            model(random_tokens(1, rows), cache)
        return len(quick)

    threaded(1)
    assert [ask(), ask()] == [1, 1]
    threaded(2)
    assert ask() == 2


def test_what_differs_is_compiled_by_itself(quick, monkeypatch):
    def ask(*args, options=cpu_loops.OPTIONS, like=inputs) -> int:
        library.library(graph(*args), like(), options)
        return len(quick)

    assert [ask(), ask()] == [1, 1]
    assert ask(3.0) == 2
    assert ask(2.0, operator.truediv) == 3
    assert ask(options={**cpu_loops.OPTIONS, "size_asserts": True}) == 4
    assert ask(like=lambda: [tensor.double() for tensor in inputs()]) == 5
    assert ask(like=lambda: [tensor.contiguous() for tensor in inputs()]) == 6
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
            assert [ask(), ask()] == [number] * 2
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    assert ask() == 11


def test_strides_of_a_single_one_do_not_differ(quick):
    """A token cut from a text is as good as one that was made alone."""
    for token in (torch.zeros(1, 7)[:, 2:3], torch.zeros(1, 1), torch.zeros(5, 1)[:1]):
        library.library(graph(), [token, token], {})
    assert len(quick) == 1


def test_the_text_that_counts_is_that_of_the_functions():
    request = library._Request.of(graph(2.0, cpu_loops._matmul), inputs(), {})
    names, source = [], library._source
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_source", lambda name: names.append(name) or source(name))
        request.key()
    assert names == ["streamllm.compiled.library", "streamllm.compiled.cpu_loops"]
    assert b"def _matmul" in source("streamllm.compiled.cpu_loops")
    assert source("streamllm.nowhere") is None


@pytest.mark.parametrize("name", [library.LIBRARY_FILE, library.DIGEST_FILE])
@pytest.mark.parametrize("spoilt", [lambda path: path.unlink(), lambda path: path.write_bytes(b"\xff\0")])
def test_what_is_not_whole_is_made_anew(quick, tmp_path, name, spoilt):
    for wanted in (1, 2, 2):
        library.library(graph(), inputs(), {})
        assert len(quick) == wanted
        if wanted == 1:
            (kept,) = (tmp_path / "kept").iterdir()
            spoilt(kept / name)


def test_where_nothing_can_be_kept_it_is_compiled_each_time(quick, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STREAMLLM_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        library.library(graph(), inputs(), {})
    assert len(quick) == 2


def test_whoever_comes_second_is_as_good(quick, monkeypatch, tmp_path):
    compile_elsewhere = library._compile_elsewhere

    def overtaken(request, path):
        with monkeypatch.context() as patch:
            patch.setattr(library, "_compile_elsewhere", compile_elsewhere)
            library.library(graph(), inputs(), {})
        compile_elsewhere(request, path)

    with monkeypatch.context() as patch:
        patch.setattr(library, "_compile_elsewhere", overtaken)
        assert library.library(graph(), inputs(), {}) == "compiled"
    assert len(quick) == 2
    assert library.library(graph(), inputs(), {}) == "compiled"
    assert len(quick) == 2
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_what_cannot_be_loaded_where_it_is_kept_is_made_anew(quick, monkeypatch, tmp_path):
    """A folder that a system with other libraries shares, or from which nothing may be run."""

    def picky(path):
        if path.is_relative_to(tmp_path):
            raise RuntimeError("Error in dlopen")
        return path.read_text()

    library.library(graph(), inputs(), {})
    monkeypatch.setattr(library, "Library", picky)
    assert library.library(graph(), inputs(), {}) == "compiled"
    assert len(quick) == 2

    def broken(path):
        raise RuntimeError("Error in dlopen")

    monkeypatch.setattr(library, "Library", broken)
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
def test_where_libraries_are_kept(monkeypatch, variables, wanted):
    for name in ("STREAMLLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert library._folder().as_posix() == wanted


def test_without_a_home_nothing_is_kept(quick, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("STREAMLLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(library.Path, "home", homeless)
    for count in (1, 2):
        assert library.library(graph(), inputs(), {}) == "compiled"
        assert len(quick) == count


def test_what_a_compiler_says_is_said(compiled, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/bin/false")
    library.check()  # it is there
    with pytest.raises(streamllm.CompileError) as raised:
        library.library(graph(), inputs(), {})
    said = str(raised.value)
    assert said.startswith("the step could not be compiled (")
    assert "/bin/false" in said
    assert said.endswith('); backend="flat" needs no compiler')
    assert "Traceback" not in said
    assert "\n" not in said
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("echo a warning >&2; kill -9 $$", "killed by signal 9"),
        ("exit 3", "exit code 3"),
        ("echo Traceback >&2; echo ImportError: no torch >&2; exit 1", "ImportError: no torch"),
    ],
)
def test_a_process_that_fails(monkeypatch, tmp_path, does, said):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("STREAMLLM_CACHE", str(tmp_path / "kept"))
    with pytest.raises(streamllm.CompileError) as raised:
        library.library(graph(), inputs(), {})
    assert f"could not be compiled ({said})" in str(raised.value)


def test_no_process_at_all(monkeypatch, tmp_path):
    monkeypatch.setenv("STREAMLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with pytest.raises(streamllm.CompileError, match="no process could be started to compile the step"):
        library.library(graph(), inputs(), {})


def test_an_interruption_ends_the_process_and_those_that_it_has_started(monkeypatch, tmp_path):
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
    for _ in range(500):  # until the system has taken notice
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.01)
    else:
        pytest.fail("a compiler is still running")
    assert not (tmp_path / "kept").exists()


def test_it_imports_what_its_parent_does_and_nothing_from_where_it_is_run(compiling, monkeypatch, tmp_path):
    (tmp_path / "types.py").write_text("raise ImportError('from here')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(library, "_CHILD", library._CHILD.replace("main()", "sys.exit(0)"))
    with pytest.raises(FileNotFoundError):  # it had nothing to do
        library.library(graph(), inputs(), {})


def test_without_a_compiler_it_is_said_at_once(monkeypatch):
    from tests.laws.scenarios import tiny_llama

    monkeypatch.setenv("CXX", "/nonexistent")
    with pytest.raises(
        RuntimeError, match=r"needs a C\+\+ compiler, and /nonexistent was not found: install"
    ):
        streamllm.compile(tiny_llama(layers=1), "inductor")
