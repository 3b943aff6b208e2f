"""A hub on loopback for the real huggingface_hub client, its cache, and a local folder."""

import pytest

from tests.hub import client, serve


@pytest.fixture
def hub(tmp_path):
    with serve() as hub, client(hub, tmp_path / "cache"):
        yield hub


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "x.json").write_text("[]")
    return folder
