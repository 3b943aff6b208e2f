"""The one way to read a file of a checkpoint: a regular file of limited size, as bytes, text or JSON.

Checkpoints are untrusted. Opening a pipe could block forever, a device may have no end, and JSON can take 60
times its size in memory. So the kind and the size of a file are checked before it is opened.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from streamllm.weights.errors import CheckpointError, CheckpointNotFound, show

# The index of a model with 100,000 tensors has 10 MB and 4 brackets. A value that takes 2 bytes of JSON can
# take 60 bytes in memory, so a file with many brackets is refused before it is parsed.
MAX_JSON_BYTES = 32 << 20
MAX_JSON_BRACKETS = 100_000


_GIT_LFS_POINTER = b"version https://git-lfs"  # its first bytes
MIN_START_BYTES = len(_GIT_LFS_POINTER)


def check_not_pointer(path: Path, start: bytes) -> None:
    """Raises CheckpointError if a file that begins with `start`, MIN_START_BYTES of it, is a git-lfs pointer.

    A folder that was cloned without git-lfs has such pointers in place of its large files.
    """
    if start.startswith(_GIT_LFS_POINTER):
        raise CheckpointError(
            f"{path} is a git-lfs pointer, not the file itself; run 'git lfs pull' in its folder"
        )


def check_regular(path: Path, shown: str) -> os.stat_result:
    """The properties of a regular file that may be read, found out without opening it.

    `shown` is what the message calls the file. Raises CheckpointNotFound where there is nothing to read, and
    CheckpointError for a folder, a pipe or a device.
    """
    try:
        found = path.stat()
    except OSError as error:
        if error.errno == errno.ENOENT and path.is_symlink():
            raise CheckpointNotFound(
                f"{shown} is a link to a file that does not exist: download or copy the file again"
            ) from error
        raise CheckpointNotFound(f"{shown} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise CheckpointError(f"{shown} cannot be read: it is {kind}, not a file")
    if not os.access(path, os.R_OK):
        raise CheckpointNotFound(
            f"no permission to read {path}: change its permissions, or download it as this user"
        )
    return found


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """All bytes of a file. Raises CheckpointError for a file that is larger or cannot be read."""
    size = check_regular(path, str(path)).st_size
    if size > max_bytes:
        raise CheckpointError(f"{path} has {size:,} bytes; at most {max_bytes:,} are allowed for such a file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; download the file again") from None
    check_not_pointer(path, data[:MIN_START_BYTES])
    return data


def read_text(path: Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    """A file of UTF-8 text. Raises CheckpointError for a file that is larger or holds anything else."""
    try:
        text = read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} cannot be read as text: {error}; download the file again") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError for a file that is larger or holds anything else."""
    text = read_text(path)
    if text.count("[") + text.count("{") > MAX_JSON_BRACKETS:
        raise CheckpointError(
            f"{path} holds more than {MAX_JSON_BRACKETS:,} lists and objects, which no JSON file of a "
            f"model needs"
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{path} is not valid JSON: {reason}; download the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {show(value)}; download the file again")
    return value
