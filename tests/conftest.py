"""Shared by all tests. One thread, because tiny models on a shared machine run faster with one."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported, by torch's compiler too

import pytest
import torch

from streamllm.compiled import library

torch.set_num_threads(1)


@pytest.fixture
def threaded() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads for one test, because weight layouts depend on it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def _libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch, _libraries: Path) -> None:
    """For tests that compile C++. Compiled libraries are kept until the end of the test session."""
    try:
        library.check()
    except RuntimeError:
        pytest.skip("no C++ compiler was found")
    monkeypatch.setenv("STREAMLLM_CACHE", str(_libraries))
