"""pytest tests/parity --checkpoint NAME_OR_FOLDER: the same tests for a checkpoint of one's own."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--checkpoint", metavar="NAME|FOLDER", help="a checkpoint to compare with transformers")


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest) -> str:
    # pytest reads the options of this file only where its folder is named on the command line
    name = request.config.getoption("--checkpoint", default=None)
    if name is None:
        pytest.skip("no --checkpoint given")
    return str(name)
