"""What an error of huggingface_hub means: a file is missing, a request may be repeated, or the user must act."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from pathlib import Path

from streamllm.weights.errors import CheckpointNotFound, shorten

COMMIT = re.compile(r"[0-9a-f]{40}")

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CACHE_NOT_WRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EIO,
    errno.ENAMETOOLONG,
)


class MissingFile(Exception):
    """The revision has no such file. `commit` is the revision's commit, if the hub told it."""

    def __init__(self, commit: str | None) -> None:
        super().__init__(commit)
        self.commit = commit


@dataclass(frozen=True)
class Download:
    """What was requested, for the message."""

    name: str
    relative: str
    revision: str
    endpoint: str
    cache: Path


def missing_file(error: Exception, revision: str) -> MissingFile | None:
    """MissingFile if the error says that the revision has no such file, else None."""
    from huggingface_hub import errors

    # A mirror may answer 404 without the hub's error code. If the revision is a commit that is known to
    # exist, only the file can be missing.
    plain_404 = bool(COMMIT.fullmatch(revision)) and 404 in (_status(error), _status(error.__cause__))
    if isinstance(error, errors.LocalEntryNotFoundError):
        refused = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
        return MissingFile(revision) if plain_404 and not isinstance(error.__cause__, refused) else None
    if not isinstance(error, errors.EntryNotFoundError):
        return MissingFile(revision) if plain_404 and type(error) is errors.HfHubHTTPError else None
    response = getattr(error, "response", None)
    commit = response.headers.get("X-Repo-Commit") if response is not None else None
    if commit is None and COMMIT.fullmatch(revision):
        commit = revision
    return MissingFile(commit if commit and COMMIT.fullmatch(commit) else None)


def worth_retrying(error: Exception) -> bool:
    """Whether the same request may succeed a little later.

    huggingface_hub has tried several times itself before it raises LocalEntryNotFoundError.
    """
    from huggingface_hub import errors

    if isinstance(
        error, errors.LocalEntryNotFoundError | errors.HFValidationError | errors.OfflineModeIsEnabled
    ):
        return False
    if isinstance(error, ValueError | TypeError | ImportError | MemoryError):
        return False
    status = _status(error)
    if status is not None:
        return status >= 500 or status == 408
    return not (isinstance(error, OSError) and error.errno in (*_NO_SPACE, *_CACHE_NOT_WRITABLE))


def explain(error: Exception, download: Download) -> CheckpointNotFound:
    """The error in one sentence, with the next step."""
    from huggingface_hub import errors

    cause: BaseException = error
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        cause = error.__cause__  # "not in the cache" wraps what went wrong with the network or the server
    name, endpoint, revision = download.name, download.endpoint, download.revision
    # A GatedRepoError is a RepositoryNotFoundError as well, so it comes first.
    if isinstance(cause, errors.GatedRepoError):
        return CheckpointNotFound(
            f"{name} is gated: accept its licence at {endpoint}/{name}, then set HF_TOKEN to a token of that "
            f"account (or run 'hf auth login')"
        )
    if isinstance(cause, errors.RepositoryNotFoundError):
        return CheckpointNotFound(
            f"there is no folder {name!r} here and no model of that name at {endpoint}, or it is private: "
            f"check the name; if it is private, set HF_TOKEN to a token that may read it"
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return CheckpointNotFound(
            f"{name} has no revision {revision!r}: give a branch, a tag or a commit of "
            f"{endpoint}/{name}/tree/main, or leave the revision out"
        )
    status = _status(cause)
    if status is not None:
        return CheckpointNotFound(_explain_status(status, download))
    return CheckpointNotFound(_explain_local(cause, download))


def _explain_status(status: int, download: Download) -> str:
    """What an HTTP status means."""
    name, relative, endpoint = download.name, download.relative, download.endpoint
    if status == 401:
        return (
            f"{endpoint} refuses access to {name} (401): set HF_TOKEN to a valid token that may read it, or "
            f"unset HF_TOKEN if the model is public"
        )
    if status == 403:
        return (
            f"{endpoint} forbids to read {relative} of {name} (403): set HF_TOKEN to a token whose "
            f"permissions include this model"
        )
    if status == 404:
        return (
            f"there is no folder {name!r} here, and {endpoint} has no {relative} of {name} at "
            f"{download.revision}: check the name and the revision"
        )
    if status == 429:
        return (
            f"{endpoint} allows no more requests for now (429): wait some minutes, or set HF_TOKEN for a "
            f"higher limit"
        )
    return f"{endpoint} failed to deliver {relative} of {name} ({status}), several times: try again later"


def _explain_local(cause: BaseException, download: Download) -> str:
    """What an error without an HTTP status means: one of the disk or of the network."""
    what = f"{download.relative} of {download.name}"
    if isinstance(cause, OSError) and cause.errno in _NO_SPACE:
        return (
            f"no space left for {what} in the cache {download.cache}: free some, or set HF_HOME to a folder "
            f"on a larger disk"
        )
    if isinstance(cause, OSError) and cause.errno in _CACHE_NOT_WRITABLE:
        return (
            f"cannot write {what} into the cache {download.cache} ({cause.strerror}): make it writable, or "
            f"set HF_HOME to a folder that is"
        )
    lines = str(cause).strip().splitlines()
    reason = f"{type(cause).__name__}: {shorten(lines[0], 200)}" if lines else type(cause).__name__
    if isinstance(cause, OSError) and type(cause).__name__ == "FileMetadataError":
        return (
            f"{download.endpoint} does not answer as a hub does: check HF_ENDPOINT and the proxy ({reason})"
        )
    return (
        f"cannot download {what} from {download.endpoint} ({reason}): check the network; if you meant a "
        f"folder, there is no {download.name!r} here; what is in the cache already loads with HF_HUB_OFFLINE=1"
    )


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of the response that an error carries."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
