"""FolderSource: a checkpoint in a local folder."""

from __future__ import annotations

import os
from pathlib import Path

from streamllm.weights.errors import CheckpointError, CheckpointNotFound, show
from streamllm.weights.source.source import Source, checked_file, checked_name


class FolderSource(Source):
    """The files of a local folder. Links may not lead out of it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.commit = None
        self.offline = False
        self._folder = folder
        root = Path(os.path.realpath(folder))
        self._roots = (root, *_blob_folders(root))

    def find(self, relative: str) -> Path | None:
        path = self.inside(relative)
        return checked_file(path, relative, self.name) if os.path.lexists(path) else None

    def files_in(self, folder: str) -> list[str]:
        path = self.inside(folder)
        if not path.is_dir():
            return []
        try:
            names = sorted(entry.name for entry in os.scandir(path) if not entry.is_dir())
        except OSError as error:
            raise CheckpointNotFound(f"{path} cannot be listed: {error.strerror}") from error
        return [f"{folder}/{name}" for name in names]

    def inside(self, relative: str) -> Path:
        """The path of `relative`. Raises CheckpointError if it is outside the folder."""
        path = self._folder / checked_name(relative)
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(root) for root in self._roots):
            raise CheckpointError(
                f"{show(relative)} in {self.name} is a link out of the folder, to {target}: put the file "
                f"itself there"
            )
        return path

    def size(self, relative: str) -> int | None:
        path = self.find(relative)
        return None if path is None else path.stat().st_size

    def file(self, relative: str) -> Path:
        path = self.find(relative)
        if path is None:
            raise CheckpointNotFound(
                f"the folder {self.name} has no file {show(relative)}: check that it is a complete checkpoint"
            )
        return path

    def __repr__(self) -> str:
        return f"Source({self.name!r})"

    def __str__(self) -> str:
        return self.name


def _blob_folders(root: Path) -> tuple[Path, ...]:
    """The folders that links may lead to if `root` is a snapshot in the hub's cache.

    They are the blobs of its own repository, and those that the repositories of a cache share.
    """
    repository = root.parent.parent
    if root.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return ()
    return repository / "blobs", repository.parent / "blobs"
