"""resolve(): the name of a checkpoint -> its Source."""

from __future__ import annotations

import os
from pathlib import Path

from streamllm.weights.errors import CheckpointError, CheckpointNotFound
from streamllm.weights.source.folder import FolderSource
from streamllm.weights.source.hub import HubSource
from streamllm.weights.source.source import Source


def resolve(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    progress: bool = True,
) -> Source:
    """The files of the checkpoint `name`: an existing folder, or else a model on the hub.

    Args:
        name: a path, or the hub's `organization/name`. An existing folder wins, as in transformers.
        revision: a branch, tag, commit or pull request (`refs/pr/1`) on the hub; None is its main branch.
        local_files_only: download nothing, as with HF_HUB_OFFLINE=1: the cache must have the files.
        token: a hub token; False for none; None for HF_TOKEN or the one that `hf auth login` saved.
        progress: show a bar while a large file is downloaded.

    Raises:
        CheckpointNotFound: there is no such folder, model or revision, no permission, or no network.
        CheckpointError: a revision was given for a folder.
    """
    is_path = not isinstance(name, str)
    text = os.fspath(name)
    if not text.strip() or "\0" in text:
        raise CheckpointNotFound(
            f"{text!r} is not the name of a checkpoint: give a folder, or a model of the hub as organization/name"
        )
    folder = Path(os.path.expanduser(text))
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{text!r} is a folder here, and a folder has no revision {revision!r}: leave the revision "
                f"out, or call from another folder to get the hub's model of that name"
            )
        return FolderSource(text, folder)
    if os.path.lexists(folder):
        raise CheckpointNotFound(
            f"{text!r} is not a folder: give the folder that holds config.json and the weights"
        )
    if "://" in text:
        raise CheckpointNotFound(f"{text!r} is a URL: give only the model's name, as organization/name")
    looks_like_path = text.startswith((".", "/", "~")) or text.endswith("/") or text.count("/") > 1
    if is_path or looks_like_path or "\\" in text:
        raise CheckpointNotFound(
            f"there is no folder {text!r}: check the path, or give a model of the hub as organization/name"
        )
    return HubSource(
        text, revision=revision, local_files_only=local_files_only, token=token, progress=progress
    )
