"""A hub name or a folder -> the local files of one revision.

A checkpoint on the hub is fetched file by file: the revision is resolved once to a commit, and every file is
then asked for by its exact name at that commit. Nothing is globbed, because repositories hold other things
beside the weights that we read (`consolidated.safetensors`, `original/`, `onnx/`). The cache is the one that
every Hugging Face tool shares, and HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT and HF_HUB_OFFLINE are
huggingface_hub's: it reads them when it is imported.

Names of files come from strangers as well (an index lists its shards), so none may leave the folder of its
checkpoint.
"""

from __future__ import annotations

import errno
import inspect
import os
import re
import stat
import time
import warnings
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from .errors import CheckpointError, CheckpointNotFound

# Seconds before the second, third and fourth try of a download. huggingface_hub resumes a broken connection
# within one try; a reset connection or a server error in the middle of it ends the try.
RETRY_SECONDS = (1.0, 4.0, 10.0)

# Files below this size are fetched without a progress bar.
PROGRESS_BYTES = 16_000_000

_T = TypeVar("_T")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MODEL = re.compile(
    r"(\b[\w.-]{1,96}\b/)?\b[\w.-]{1,96}\b", re.ASCII
)  # the hub's rule, with the three beside it below


def resolve(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    progress: bool = True,
) -> Source:
    """The checkpoint `name`: an existing folder, or else a model of the hub.

    `name` is a path, or the hub's `organization/name`; an existing folder wins, as in transformers.
    `revision` is a branch, a tag, a commit or a pull request (`refs/pr/1`) of the hub, and defaults to its
    main branch. With `local_files_only`, or HF_HUB_OFFLINE=1, nothing is fetched: the cache must have it.
    `token` is a hub token, False for none, or None for HF_TOKEN or the one saved by `hf auth login`.

    Raises CheckpointNotFound, with the next step, where there is no such folder, model or revision, no
    permission, or no network; CheckpointError for names that nothing can have.
    """
    is_path = not isinstance(name, str)
    text = os.fspath(name)
    if not text.strip() or "\0" in text:
        raise CheckpointNotFound(
            f"{text!r} names no checkpoint: give a folder, or a model of the hub as organization/name"
        )
    folder = Path(os.path.expanduser(text))
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{text!r} is a folder here, and a folder has no revision {revision!r}: leave the revision"
                " out, or call from another folder to get the hub's model of that name"
            )
        return _Folder(text, folder)
    if os.path.lexists(folder):
        raise CheckpointNotFound(
            f"{text!r} is not a folder: give the folder that holds config.json and the weights"
        )
    if "://" in text:
        raise CheckpointNotFound(f"{text!r} is an address: give the model's name alone, as organization/name")
    if (
        is_path
        or text.startswith((".", "/", "~"))
        or text.endswith("/")
        or text.count("/") > 1
        or "\\" in text
    ):
        raise CheckpointNotFound(
            f"there is no folder {text!r}: check the path, or give a model of the hub as organization/name"
        )
    return _Hub(text, revision=revision, local_files_only=local_files_only, token=token, progress=progress)


class Source:
    """The files of one revision of a checkpoint, fetched when they are asked for.

    `name` is what the caller gave; `commit` the 40 digits of the hub's commit, None for a folder. `offline`
    says that nothing can be fetched, so that what is not found may be on the hub all the same.
    """

    name: str
    commit: str | None
    offline: bool

    def find(self, relative: str) -> Path | None:
        """The local path of the file `relative`, fetched if need be; None if this revision has no such file.

        Raises CheckpointNotFound where that cannot be found out or the file cannot be had, and
        CheckpointError if `relative` leaves the checkpoint or is no regular file. Offline, a file that the
        cache knows nothing about counts as absent, with a warning: caches that other tools filled seldom say
        which files a model does not have.
        """
        raise NotImplementedError

    def has(self, relative: str) -> bool:
        """Whether there is a file `relative`, found out without fetching it; errors as for `find`."""
        return self.size(relative) is not None

    def size(self, relative: str) -> int | None:
        """The bytes of the file `relative`, found out without fetching it; None where there is none."""
        raise NotImplementedError

    def file(self, relative: str) -> Path:
        """The local path of the file `relative`, which this checkpoint must have: as `find`, but absent is an
        error."""
        raise NotImplementedError


class _Folder(Source):
    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.commit = None
        self.offline = False
        self._folder = folder
        root = Path(os.path.realpath(folder))
        self._roots = (root, *_blobs(root))

    def find(self, relative: str) -> Path | None:
        path = self._folder / _inside(relative)
        real = os.path.realpath(path)
        if not any(Path(real).is_relative_to(root) for root in self._roots):
            raise CheckpointError(
                f"{_show(relative)} in {self.name} is a link out of the folder, to {real}: put the file"
                " itself there"
            )
        if not os.path.lexists(path):
            return None
        return _regular(path, relative, self.name)

    def size(self, relative: str) -> int | None:
        path = self.find(relative)
        return None if path is None else path.stat().st_size

    def file(self, relative: str) -> Path:
        path = self.find(relative)
        if path is None:
            raise CheckpointNotFound(
                f"the folder {self.name} has no file {_show(relative)}: is it a checkpoint, and whole?"
            )
        return path

    def __repr__(self) -> str:
        return f"Source({self.name!r})"

    def __str__(self) -> str:
        return self.name


class _Hub(Source):
    def __init__(
        self,
        name: str,
        *,
        revision: str | None,
        local_files_only: bool,
        token: str | bool | None,
        progress: bool,
    ) -> None:
        from huggingface_hub import constants

        if not _MODEL.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git"):
            raise CheckpointNotFound(
                f"there is no folder {name!r}, and no model of the hub can have that name: give an existing"
                " folder, or organization/name"
            )
        self.name = name
        self.commit = None
        self._revision = _checked_revision(revision)
        self._offline_by = (
            "local_files_only" if local_files_only else "HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else None
        )
        self.offline = self._offline_by is not None
        self._token = token
        self._progress = progress
        self._cache = Path(constants.HF_HUB_CACHE)
        self._endpoint = constants.ENDPOINT
        self.commit = self._resolve()

    def _resolve(self) -> str:
        """The commit of the revision, found by fetching config.json at it.

        That is one request where the file is in the cache already, and none if the revision is a commit; it
        leaves the branch's commit in the cache for the time without a network.
        """
        if self._offline_by:
            return self._commit_in_cache()
        try:
            path = self._fetch("config.json", self._revision)
        except _Absent as absent:
            if absent.commit is None:
                raise self._no_file("config.json") from absent
            return absent.commit
        return path.parent.name

    def _commit_in_cache(self) -> str:
        stored = self._cache / ("models--" + self.name.replace("/", "--"))
        if not stored.is_dir():
            raise self._not_cached(f"{self.name} is")
        ref = stored / "refs" / self._revision
        commit = self._revision
        if not _COMMIT.fullmatch(commit):
            commit = ref.read_text().strip() if ref.is_file() else ""
        if not _COMMIT.fullmatch(commit) or not (stored / "snapshots" / commit).is_dir():
            raise self._not_cached(f"revision {self._revision} of {self.name} is")
        return commit

    def find(self, relative: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        relative = _inside(relative).as_posix()
        assert self.commit is not None
        cached = try_to_load_from_cache(self.name, relative, cache_dir=self._cache, revision=self.commit)
        if isinstance(cached, str):
            return _regular(Path(cached), relative, self.name)
        if cached is not None:  # the cache knows that this commit has no such file
            return None
        if self._offline_by:
            if not self._known_absent(relative):
                warnings.warn(
                    f"{self._offline_by} is set, and the cache does not say whether {self.name} has a file"
                    f" {relative}: going on without it; load once with a network to find out",
                    stacklevel=2,
                )
            return None
        try:
            return _regular(self._fetch(relative, self.commit), relative, self.name)
        except _Absent:
            return None

    def size(self, relative: str) -> int | None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

        relative = _inside(relative).as_posix()
        cached = try_to_load_from_cache(self.name, relative, cache_dir=self._cache, revision=self.commit)
        if self._offline_by or cached is not None:
            return Path(cached).stat().st_size if isinstance(cached, str) else None
        assert self.commit is not None
        url = hf_hub_url(self.name, relative, revision=self.commit)
        try:
            found = self._trying(lambda: get_hf_file_metadata(url, token=self._token), relative, self.commit)
        except _Absent:
            return None
        return found.size or 0

    def file(self, relative: str) -> Path:
        from huggingface_hub import try_to_load_from_cache

        relative = _inside(relative).as_posix()
        if self._offline_by and not self._known_absent(relative):
            # Asked directly, so that the error is that the cache lacks the file and not that the model does.
            cached = try_to_load_from_cache(self.name, relative, cache_dir=self._cache, revision=self.commit)
            if cached is None:
                raise self._not_cached(f"{relative} of {self.name} is", relative)
        path = self.find(relative)
        if path is None:
            raise self._no_file(relative)
        return path

    def _known_absent(self, relative: str) -> bool:
        """Whether a list of the commit's files is in the cache (a download of all of them leaves one) and
        lacks this."""
        try:
            from huggingface_hub import get_cached_repo_tree

            files = get_cached_repo_tree(self.name, revision=self.commit, cache_dir=self._cache)
        except Exception:  # older than such lists, or no list, or not readable: then nothing is known
            return False
        return all(file.path != relative for file in files)

    def _fetch(self, relative: str, revision: str) -> Path:
        """One file at one revision from the hub or the cache; _Absent if the revision has no such file."""
        from huggingface_hub import hf_hub_download

        options: dict[str, Any] = {}
        if "tqdm_class" in inspect.signature(hf_hub_download).parameters:
            options["tqdm_class"] = _bars(self._progress)
        options |= {"revision": revision, "cache_dir": self._cache, "token": self._token}
        return Path(self._trying(lambda: hf_hub_download(self.name, relative, **options), relative, revision))

    def _trying(self, ask: Callable[[], _T], relative: str, revision: str) -> _T:
        """What `ask` answers, asked again after errors that may pass."""
        for seconds in (*RETRY_SECONDS, None):
            try:
                return ask()
            except Exception as error:
                absent = _absent(error, revision)
                if absent is not None:
                    raise absent from error
                if seconds is None or not _passing(error):
                    raise self._explain(error, relative, revision) from error
            time.sleep(seconds)
        raise AssertionError("unreachable")

    # What went wrong, in one sentence with the next step.

    def _no_file(self, relative: str) -> CheckpointNotFound:
        where = self.commit or self._revision
        return CheckpointNotFound(
            f"{self.name} has no file {relative} at {where}: see what it has at"
            f" {self._endpoint}/{self.name}/tree/{where}"
        )

    def _not_cached(self, what: str, relative: str = "") -> CheckpointNotFound:
        revision = "" if self._revision == "main" else f" --revision {self._revision}"
        command = f"hf download {self.name} {relative}".strip() + revision
        return CheckpointNotFound(
            f"{what} not in the cache {self._cache}, and {self._offline_by} forbids to fetch it: load once"
            f" without that and with a network, or run '{command}'"
        )

    def _explain(self, error: Exception, relative: str, revision: str) -> CheckpointNotFound:
        from huggingface_hub import errors

        name, endpoint = self.name, self._endpoint
        # The hub's client wraps what went wrong with the network or the server in "not in the cache".
        cause = (
            error.__cause__
            if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__
            else error
        )
        status = _status(cause)
        if isinstance(cause, errors.GatedRepoError):  # a RepositoryNotFoundError as well, so it comes first
            text = (
                f"{name} is gated: accept its licence at {endpoint}/{name}, then set HF_TOKEN to a token of"
                " that account (or run 'hf auth login')"
            )
        elif isinstance(cause, errors.RepositoryNotFoundError):
            text = (
                f"there is no folder {name!r} here and no model of that name at {endpoint}, or it is"
                " private: check the name; if it is private, set HF_TOKEN to a token that may read it"
            )
        elif isinstance(cause, errors.RevisionNotFoundError):
            text = (
                f"{name} has no revision {revision!r}: give a branch, a tag or a commit of"
                f" {endpoint}/{name}/tree/main, or leave the revision out"
            )
        elif status == 401:
            text = (
                f"{endpoint} refuses access to {name} (401): set HF_TOKEN to a valid token that may read it,"
                " or unset HF_TOKEN if the model is public"
            )
        elif status == 403:
            text = (
                f"{endpoint} forbids to read {relative} of {name} (403): set HF_TOKEN to a token whose"
                " permissions include this model"
            )
        elif status == 404:
            text = (
                f"there is no folder {name!r} here, and {endpoint} knows no {relative} of {name} at"
                f" {revision}: check the name and the revision"
            )
        elif status == 429:
            text = (
                f"{endpoint} allows no more requests for now (429): wait some minutes, or set HF_TOKEN for a"
                " higher limit"
            )
        elif status is not None:
            text = (
                f"{endpoint} failed to deliver {relative} of {name} ({status}), several times: try again"
                " later"
            )
        elif isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            text = (
                f"no space left for {relative} of {name} in the cache {self._cache}: free some, or set"
                " HF_HOME to a folder on a larger disk"
            )
        elif isinstance(cause, OSError) and cause.errno in _CACHE_ERRORS:
            text = (
                f"cannot write {relative} of {name} into the cache {self._cache} ({cause.strerror}): make it"
                " writable, or set HF_HOME to a folder that is"
            )
        elif isinstance(cause, OSError) and type(cause).__name__ == "FileMetadataError":
            text = (
                f"{endpoint} does not answer as a hub does: check HF_ENDPOINT and the proxy"
                f" ({_first_line(cause)})"
            )
        else:
            text = (
                f"cannot fetch {relative} of {name} from {endpoint} ({_first_line(cause)}): check the"
                " network; what is in the cache already loads with HF_HUB_OFFLINE=1"
            )
        return CheckpointNotFound(text)

    def __repr__(self) -> str:
        return f"Source({self.name!r}, commit={self.commit!r})"

    def __str__(self) -> str:
        return f"{self.name} at {self.commit[:7] if self.commit else self._revision}"


class _Absent(Exception):
    """The revision has no such file; `commit` is what the hub says that the revision is."""

    def __init__(self, commit: str | None) -> None:
        super().__init__(commit)
        self.commit = commit


_CACHE_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EIO,
    errno.ENAMETOOLONG,
)


def _absent(error: Exception, revision: str) -> _Absent | None:
    from huggingface_hub import errors

    # A mirror may answer 404 without the hub's error code. At a commit that is known already it can only be
    # the file.
    plain_404 = bool(_COMMIT.fullmatch(revision)) and 404 in (_status(error), _status(error.__cause__))
    if isinstance(error, errors.LocalEntryNotFoundError):
        refused = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
        return _Absent(revision) if plain_404 and not isinstance(error.__cause__, refused) else None
    if not isinstance(error, errors.EntryNotFoundError):
        return _Absent(revision) if plain_404 and type(error) is errors.HfHubHTTPError else None
    response = getattr(error, "response", None)
    commit = response.headers.get("X-Repo-Commit") if response is not None else None
    if commit is None and _COMMIT.fullmatch(revision):
        commit = revision
    return _Absent(commit if commit and _COMMIT.fullmatch(commit) else None)


def _passing(error: Exception) -> bool:
    """Whether to try once more. The hub's client has tried several times before it says
    LocalEntryNotFoundError."""
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
    return not (
        isinstance(error, OSError)
        and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, *_CACHE_ERRORS)
    )


def _status(error: BaseException | None) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _bars(progress: bool) -> type:
    from huggingface_hub.utils.tqdm import tqdm

    base: Any = tqdm

    class Bars(base):  # type: ignore[misc]
        """Bars for big files only; elsewhere huggingface_hub's (none where stderr is no terminal, or if
        disabled)."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if not progress or (kwargs.get("total") or PROGRESS_BYTES) < PROGRESS_BYTES:
                kwargs["disable"] = True
            super().__init__(*args, **kwargs)

    return Bars


# Names of files.


def _show(relative: object) -> str:
    text = repr(relative)
    return text if len(text) <= 100 else text[:97] + "…'"


def _inside(relative: str) -> PurePosixPath:
    """`relative` as a path that cannot leave its folder under the rules of any system, or CheckpointError."""

    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(
            f"the file name {_show(relative)} {reason}: a checkpoint may only name files inside its own"
            " folder"
        )

    if not isinstance(relative, str):
        raise refuse("is no text")
    path = PurePosixPath(relative)
    if not path.parts:
        raise refuse("is empty")
    if path.is_absolute():
        raise refuse("is an absolute path")
    if ".." in path.parts:
        raise refuse("climbs out with '..'")
    if "\\" in relative or re.match(r"[A-Za-z]:", relative):
        raise refuse("has a backslash or a drive letter")
    if any(ord(char) < 32 or ord(char) == 127 or 0xD800 <= ord(char) < 0xE000 for char in relative):
        raise refuse("has control characters")
    if len(relative.encode()) > 1024 or any(len(part.encode()) > 255 for part in path.parts):
        raise refuse("is too long")
    return path


def _checked_revision(revision: str | None) -> str:
    if revision is None:
        return "main"
    odd = any(ord(char) <= 32 or ord(char) == 127 or char in "\\~^:?*[" for char in revision)
    if (
        odd
        or not revision
        or ".." in revision
        or revision.startswith(("/", "-", "."))
        or revision.endswith("/")
    ):
        raise CheckpointNotFound(
            f"{_show(revision)} can be no revision: give a branch, a tag, a commit, or a pull request as"
            " refs/pr/1"
        )
    return revision


def _blobs(root: Path) -> tuple[Path, ...]:
    """Where the links of `root` may lead if it is a snapshot in the hub's cache: to the blobs of its own
    repository, and to those that repositories of one cache share."""
    repository = root.parent.parent
    if root.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return ()
    return repository / "blobs", repository.parent / "blobs"


def _regular(path: Path, relative: str, name: str) -> Path:
    """`path` if it is a file that can be read; found out without opening it, because to open a pipe would
    hang."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise CheckpointNotFound(
                f"{_show(relative)} of {name} is a link to nothing: fetch or copy the file again"
            ) from error
        raise CheckpointNotFound(f"cannot read {_show(relative)} of {name}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise CheckpointError(f"{_show(relative)} of {name} is {kind}, not a file")
    if not os.access(path, os.R_OK):
        raise CheckpointNotFound(
            f"no permission to read {path}: change its permissions, or fetch it as this user"
        )
    return path
