"""Shared by all tests: one thread, because tiny models on shared machines run faster so."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from streamllm.compiled import library

torch.set_num_threads(1)


@pytest.fixture
def threaded() -> Iterator[Callable[[int], None]]:
    """Sets how many threads torch has, for one test: layouts depend on it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def _libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch, _libraries: Path) -> None:
    """For a test that compiles C++: what is compiled is kept for as long as the tests run."""
    try:
        library.check()
    except RuntimeError:
        pytest.skip("no C++ compiler was found")
    monkeypatch.setenv("STREAMLLM_CACHE", str(_libraries))
