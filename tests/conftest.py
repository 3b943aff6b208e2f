"""Shared by all tests: one thread, because tiny models on shared machines run faster so."""

from collections.abc import Callable, Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def threaded() -> Iterator[Callable[[int], None]]:
    """Sets how many threads torch has, for one test: layouts depend on it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
