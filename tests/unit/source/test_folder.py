"""Local folders: the files that they need, and files that are refused."""

import os
import re

import pytest

from streamllm.weights.errors import CheckpointError, CheckpointNotFound
from streamllm.weights.source import resolve
from tests.unit.source.samples import NAME, PLAIN, error_message


def test_files_of_a_folder(folder):
    for name in (folder, str(folder), f"{folder}/"):
        source = resolve(name)
        assert source.commit is None
        assert source.file("config.json") == folder / "config.json"
        assert source.file("sub/x.json").read_text() == "[]"
        assert source.find("model.safetensors") is None
        assert source.find("config.json/x") is None
        assert source.has("config.json")
        assert not source.has("model.safetensors")
        with pytest.raises(CheckpointNotFound, match=r"has no file 'model.safetensors'"):
            source.file("model.safetensors")


def test_folder_wins_over_the_hub(hub, tmp_path, monkeypatch):
    hub.add(NAME, PLAIN)
    here = tmp_path / NAME
    here.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve(NAME).commit is None
    assert hub.asked == []
    error_message(
        "is a folder here, and a folder has no revision 'v1': leave the revision out",
        NAME,
        revision="v1",
        kind=CheckpointError,
    )


def test_file_and_missing_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    error_message("is not a folder: give the folder that holds config.json", tmp_path / "model.safetensors")
    error_message("there is no folder", tmp_path / "none")


def test_folder_in_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve("~/checkpoint").file("config.json").exists()


LEAVING_NAMES = [
    *(
        "/etc/passwd",
        "//etc/passwd",
        "../config.json",
        "sub/../../config.json",
        "..",
        "sub/..",
        "a\\b",
        "..\\x",
    ),
    *("C:x", "c:/x", "", ".", "./", "a\0b", "a\nb", "x" * 256, "x/" * 600 + "x", "\ud800"),
    *(None, 7, ["a"], {"a": 1}),
]


@pytest.mark.parametrize("relative", LEAVING_NAMES, ids=lambda value: repr(value)[:20])
def test_names_that_leave_the_folder(hub, folder, relative):
    hub.add(NAME, PLAIN)
    for source in (resolve(folder), resolve(NAME)):
        hub.forget()
        for ask in (source.file, source.find, source.has):
            with pytest.raises(
                CheckpointError,
                match=r"^the file name .*: a checkpoint may only name files inside its own folder",
            ) as caught:
                ask(relative)
            assert len(str(caught.value)) < 300
        assert hub.asked == []


def test_links(folder, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to("..")
    (folder / "in").symlink_to("config.json")
    (folder / "nothing").symlink_to("gone")
    (folder / "loop").symlink_to("loop")
    source = resolve(folder)
    assert source.file("in").read_text() == "{}"
    for relative in ("out", "up/secret", "up/none"):
        with pytest.raises(CheckpointError, match="is a link out of the folder"):
            source.find(relative)
    with pytest.raises(CheckpointNotFound, match=r"'nothing' of .* is a link to a file that does not exist"):
        source.find("nothing")
    with pytest.raises(CheckpointNotFound, match=r"'loop' of .* cannot be read"):
        source.find("loop")
    (tmp_path / "alias").symlink_to(folder)
    assert resolve(tmp_path / "alias").file("config.json").read_text() == "{}"


def test_irregular_files_are_not_opened(folder):
    os.mkfifo(folder / "pipe")
    source = resolve(folder)
    with pytest.raises(CheckpointError, match=r"'pipe' of .* it is a pipe or a device, not a file"):
        source.find("pipe")
    with pytest.raises(CheckpointError, match=r"'sub' of .* it is a folder, not a file"):
        source.find("sub")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(folder):
    (folder / "config.json").chmod(0)
    with pytest.raises(CheckpointNotFound, match=r"no permission to read .*config.json"):
        resolve(folder).find("config.json")


def test_snapshot_in_the_cache_as_a_folder(hub, cache, tmp_path):
    hub.add(NAME, PLAIN)
    snapshot = resolve(NAME).file("model.safetensors").parent
    assert (snapshot / "model.safetensors").is_symlink()
    source = resolve(snapshot)
    assert source.commit is None
    assert source.file("model.safetensors").read_bytes() == PLAIN["model.safetensors"]
    (snapshot / "evil").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="is a link out of the folder"):
        source.file("evil")


def test_names_in_messages(hub, folder):
    commit = hub.add(NAME, PLAIN)
    assert repr(resolve(NAME)) == f"Source('{NAME}', commit='{commit}')"
    assert str(resolve(NAME)) == f"{NAME} at {commit[:7]}"
    assert re.search(r"^Source\('.*/checkpoint'\)$", repr(resolve(folder)))
