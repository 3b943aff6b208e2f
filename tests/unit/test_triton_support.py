"""Triton is optional: it is imported only where it serves, and its absence or failure changes no result."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings

import pytest
import torch

import streamllm
from streamllm.cache import SinkCache
from streamllm.compiled import api, cuda, triton_support
from tests.laws.scenarios import error, feed, random_tokens, tiny_llama


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(api, "CAPTURABLE", ("cpu",))
    monkeypatch.setattr(triton_support, "DEVICES", ("cpu",))
    monkeypatch.setattr(cuda, "capture", lambda function, device: function)
    works = triton_support._works
    works.cache_clear()
    yield
    works.cache_clear()


def test_importing_the_library_does_not_import_triton() -> None:
    code = "import sys, streamllm, streamllm.compiled.api; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def decode(model) -> None:
    tokens, plain = random_tokens(20), tiny_llama.__wrapped__(dtype=torch.float32)
    compiled = streamllm.compile(model, "cudagraphs")
    got = feed(compiled, SinkCache(compiled, 2, 5), tokens)
    assert error(got, feed(plain, SinkCache(plain, 2, 5), tokens)) <= 1e-4


def test_without_triton_the_recording_stays(on_cpu, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "triton" else find(name, *more)
    )
    model = tiny_llama.__wrapped__(dtype=torch.float32)
    assert not triton_support.supported(torch.device("cpu"), torch.float32)
    decode(model)


def test_a_triton_that_does_not_run_is_warned_of_once(on_cpu, monkeypatch) -> None:
    launch = pytest.importorskip("streamllm.compiled.triton_launch")
    monkeypatch.setattr(launch, "gated", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="Triton does not work here \\(ZeroDivisionError"):
        decode(tiny_llama.__wrapped__(dtype=torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(tiny_llama.__wrapped__(dtype=torch.float32))


def test_a_kernel_that_fails_leaves_the_recording(on_cpu, monkeypatch) -> None:
    launch = pytest.importorskip("streamllm.compiled.triton_launch")
    assert triton_support.supported(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(launch, "attended", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="Triton does not work here"):
        decode(tiny_llama.__wrapped__(dtype=torch.float32))
