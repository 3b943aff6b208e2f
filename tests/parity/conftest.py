"""The checkpoints of the grid, made once for all tests; and the one given by --checkpoint NAME_OR_FOLDER."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from tests.parity.cases import Case
from tests.parity.grid import VARIANTS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--checkpoint", metavar="NAME|FOLDER", help="a checkpoint to compare with transformers")


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest) -> str:
    # pytest knows this option only where the folder of this file is named on the command line.
    name = request.config.getoption("--checkpoint", default=None)
    if name is None:
        pytest.skip("no --checkpoint given")
    return str(name)


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Returns a case of the grid by its name."""
    variants = {variant.name: variant for variant in VARIANTS}
    assert len(variants) == len(VARIANTS)
    return cache(lambda name: Case(variants[name], tmp_path_factory.mktemp(name)))


@pytest.fixture(params=[variant.name for variant in VARIANTS])
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)
