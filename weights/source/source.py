"""Source: the files of one revision of a checkpoint, and the checks of their names."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath

from streamllm.weights.errors import CheckpointError, show
from streamllm.weights.files import check_regular

MAX_NAME_BYTES = 1024  # of a relative path; file systems allow 255 for each part
MAX_PART_BYTES = 255


class Source(ABC):
    """The files of one revision of a checkpoint. A file is downloaded when it is asked for.

    Attributes:
        name: the name that the caller gave.
        commit: the hub's commit, 40 hexadecimal digits; None for a folder.
        offline: nothing can be downloaded, so a file that is not found may still exist on the hub.
    """

    name: str
    commit: str | None
    offline: bool

    @abstractmethod
    def find(self, relative: str) -> Path | None:
        """The local path of the file `relative`, or None if this revision has no such file.

        Offline, a file that the cache knows nothing about counts as absent, with a warning: caches that other
        tools filled seldom record which files a model does not have.

        Raises:
            CheckpointNotFound: the file cannot be had, or it is unknown whether there is one.
            CheckpointError: `relative` leaves the checkpoint's folder, or is not a regular file.
        """

    @abstractmethod
    def files_in(self, folder: str) -> list[str]:
        """The names of the files in a subfolder, as `find` takes them, sorted; none if there is no such folder.

        Raises:
            CheckpointNotFound: the folder cannot be listed.
            CheckpointError: it is a link that leaves the checkpoint's folder.
        """

    @abstractmethod
    def size(self, relative: str) -> int | None:
        """The bytes of the file `relative`, without downloading it; None if there is no such file."""

    @abstractmethod
    def file(self, relative: str) -> Path:
        """The local path of a file that this checkpoint must have.

        Raises what `find` raises, and CheckpointNotFound if there is no such file.
        """

    def has(self, relative: str) -> bool:
        """Whether there is a file `relative`, without downloading it. Raises what `find` raises."""
        return self.size(relative) is not None


def checked_name(relative: str) -> PurePosixPath:
    """`relative` as a path that stays inside its folder, by the rules of every operating system.

    Names are untrusted, too: an index names its shards. Raises CheckpointError.
    """

    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(
            f"the file name {show(relative)} {reason}: a checkpoint may only name files inside its own folder"
        )

    if not isinstance(relative, str):
        raise refuse("is not a string")
    path = PurePosixPath(relative)
    if not path.parts:
        raise refuse("is empty")
    if path.is_absolute():
        raise refuse("is an absolute path")
    if ".." in path.parts:
        raise refuse("leaves its folder with '..'")
    if "\\" in relative or re.match(r"[A-Za-z]:", relative):
        raise refuse("has a backslash or a drive letter")
    if any(ord(char) < 32 or ord(char) == 127 or 0xD800 <= ord(char) < 0xE000 for char in relative):
        raise refuse("has control characters")
    if len(relative.encode()) > MAX_NAME_BYTES or any(
        len(part.encode()) > MAX_PART_BYTES for part in path.parts
    ):
        raise refuse("is too long")
    return path


def checked_file(path: Path, relative: str, name: str) -> Path:
    """`path`, if it is a regular file that may be read; the errors name `relative` and the checkpoint."""
    check_regular(path, f"{show(relative)} of {name}")
    return path
