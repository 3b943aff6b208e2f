"""One copy of each checkpoint for all tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from tests.parity.cases import Case
from tests.parity.grid import VARIANTS


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """A case of the grid by its name."""
    variants = {variant.name: variant for variant in VARIANTS}
    assert len(variants) == len(VARIANTS)
    return cache(lambda name: Case(variants[name], tmp_path_factory.mktemp(name)))


@pytest.fixture(params=[variant.name for variant in VARIANTS])
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)
