"""HubSource: a checkpoint on the Hugging Face hub, at one commit.

The revision is resolved once, to a commit. Every file is then requested by its exact name at that commit. No
pattern of names is used, because repositories also hold weights that we must not read
(`consolidated.safetensors`, `original/`, `onnx/`). The cache is the one that all Hugging Face tools share.
huggingface_hub reads HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT and HF_HUB_OFFLINE when it is imported.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from streamllm.weights.errors import CheckpointNotFound, show
from streamllm.weights.source.hub_errors import (
    COMMIT,
    Download,
    MissingFile,
    explain,
    missing_file,
    worth_retrying,
)
from streamllm.weights.source.source import Source, checked_file, checked_name

# Seconds before the second, third and fourth attempt of a download. Within an attempt, huggingface_hub itself
# resumes a connection that was closed; a connection reset or a server error in the middle ends the attempt.
RETRY_SECONDS = (1.0, 4.0, 10.0)

ABSENT_FOLDER = "_"  # a file of this name in the cache's list of absent files stands for their whole folder

MIN_PROGRESS_BYTES = 16_000_000  # smaller files are downloaded without a progress bar

# The hub's rule for names, together with the three checks in `HubSource.__init__`.
_MODEL_NAME = re.compile(r"(\b[\w.-]{1,96}\b/)?\b[\w.-]{1,96}\b", re.ASCII)

_T = TypeVar("_T")


class HubSource(Source):
    """The files of one commit of a model on the hub. Arguments and errors as for `resolve`."""

    commit: str

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

        if not _MODEL_NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git"):
            raise CheckpointNotFound(
                f"there is no folder {name!r}, and no model of the hub can have that name: give an existing "
                f"folder, or organization/name"
            )
        self.name = name
        self._revision = _checked_revision(revision)
        self._offline_by = (
            "local_files_only" if local_files_only else "HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else None
        )
        self.offline = self._offline_by is not None
        self._token = token
        self._progress = progress
        self._cache = Path(constants.HF_HUB_CACHE)
        self._endpoint = constants.ENDPOINT
        self.commit = self._commit_in_cache() if self.offline else self._commit_on_hub()

    def find(self, relative: str) -> Path | None:
        relative = checked_name(relative).as_posix()
        cached = self._in_cache(relative)
        if isinstance(cached, str):
            return checked_file(Path(cached), relative, self.name)
        if cached is not None:  # the cache knows that this commit has no such file
            return None
        if self.offline:
            if not self._known_absent(relative):
                warnings.warn(
                    f"{self._offline_by} is set, and the cache does not say whether {self.name} has a file "
                    f"{relative}: going on without it; load once with a network to find out",
                    stacklevel=2,
                )
            return None
        try:
            return checked_file(self._download(relative, self.commit), relative, self.name)
        except MissingFile:
            return None

    def files_in(self, folder: str) -> list[str]:
        from huggingface_hub import HfApi

        folder = checked_name(folder).as_posix()
        repository = self._cache / ("models--" + self.name.replace("/", "--"))
        absent = repository / ".no_exist" / self.commit / folder / ABSENT_FOLDER
        if self.offline or absent.is_file():
            snapshot = repository / "snapshots" / self.commit / folder
            found = snapshot.iterdir() if snapshot.is_dir() else ()
            return sorted(f"{folder}/{path.name}" for path in found if not path.is_dir())
        hub = HfApi(endpoint=self._endpoint, token=self._token)
        try:
            entries = self._with_retries(
                lambda: list(hub.list_repo_tree(self.name, folder, revision=self.commit)), folder, self.commit
            )
        except MissingFile:
            # Noted where the hub's client notes absent files, so that the next load sends no request.
            with contextlib.suppress(OSError):
                absent.parent.mkdir(parents=True, exist_ok=True)
                absent.touch()
            return []
        return sorted(entry.path for entry in entries if hasattr(entry, "blob_id"))

    def size(self, relative: str) -> int | None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        relative = checked_name(relative).as_posix()
        cached = self._in_cache(relative)
        if self.offline or cached is not None:
            return Path(cached).stat().st_size if isinstance(cached, str) else None
        url = hf_hub_url(self.name, relative, revision=self.commit)
        try:
            found = self._with_retries(
                lambda: get_hf_file_metadata(url, token=self._token), relative, self.commit
            )
        except MissingFile:
            return None
        return found.size or 0

    def file(self, relative: str) -> Path:
        relative = checked_name(relative).as_posix()
        if self.offline and self._in_cache(relative) is None and not self._known_absent(relative):
            raise self._not_cached(f"{relative} of {self.name} is", relative)
        path = self.find(relative)
        if path is None:
            raise self._no_such_file(relative, self.commit)
        return path

    def _commit_on_hub(self) -> str:
        """The commit of the revision, found by downloading config.json.

        That takes one request if the file is in the cache already, and none if the revision is a commit. It
        also records the commit of a branch in the cache, for later use offline.
        """
        try:
            path = self._download("config.json", self._revision)
        except MissingFile as missing:
            if missing.commit is None:
                raise self._no_such_file("config.json", self._revision) from missing
            return missing.commit
        return path.parent.name

    def _commit_in_cache(self) -> str:
        repository = self._cache / ("models--" + self.name.replace("/", "--"))
        if not repository.is_dir():
            raise self._not_cached(f"{self.name} is")
        commit = self._revision
        if not COMMIT.fullmatch(commit):
            reference = repository / "refs" / self._revision
            commit = reference.read_text().strip() if reference.is_file() else ""
        if not COMMIT.fullmatch(commit) or not (repository / "snapshots" / commit).is_dir():
            raise self._not_cached(f"revision {self._revision} of {self.name} is")
        return commit

    def _in_cache(self, relative: str) -> str | object | None:
        """The path of a file in the cache, None if it is not there, another object if the commit lacks it."""
        from huggingface_hub import try_to_load_from_cache

        found: str | object | None = try_to_load_from_cache(
            self.name, relative, cache_dir=self._cache, revision=self.commit
        )
        return found

    def _known_absent(self, relative: str) -> bool:
        """Whether the cache has a list of the commit's files, without this one.

        A download of a whole repository leaves such a list.
        """
        try:
            from huggingface_hub import get_cached_repo_tree

            files = get_cached_repo_tree(self.name, revision=self.commit, cache_dir=self._cache)
        except Exception:  # an older huggingface_hub without such lists, or no readable list
            return False
        return all(file.path != relative for file in files)

    def _download(self, relative: str, revision: str) -> Path:
        """One file at one revision, from the hub or the cache. Raises MissingFile if there is no such file."""
        from huggingface_hub import hf_hub_download

        options: dict[str, Any] = {"revision": revision, "cache_dir": self._cache, "token": self._token}
        if "tqdm_class" in inspect.signature(hf_hub_download).parameters:
            options["tqdm_class"] = _progress_bar(self._progress)
        return Path(
            self._with_retries(lambda: hf_hub_download(self.name, relative, **options), relative, revision)
        )

    def _with_retries(self, request: Callable[[], _T], relative: str, revision: str) -> _T:
        """The result of `request`, which is repeated after errors that may be temporary."""
        for seconds in (*RETRY_SECONDS, None):
            try:
                with _one_warning(self._endpoint):
                    return request()
            except Exception as error:
                missing = missing_file(error, revision)
                if missing is not None:
                    raise missing from error
                if seconds is None or not worth_retrying(error):
                    download = Download(self.name, relative, revision, self._endpoint, self._cache)
                    raise explain(error, download) from error
            time.sleep(seconds)
        raise AssertionError("unreachable")

    def _no_such_file(self, relative: str, revision: str) -> CheckpointNotFound:
        return CheckpointNotFound(
            f"{self.name} has no file {relative} at {revision}: see its files at "
            f"{self._endpoint}/{self.name}/tree/{revision}"
        )

    def _not_cached(self, what: str, relative: str = "") -> CheckpointNotFound:
        revision = "" if self._revision == "main" else f" --revision {self._revision}"
        command = f"hf download {self.name} {relative}".strip() + revision
        return CheckpointNotFound(
            f"{what} not in the cache {self._cache}, and {self._offline_by} forbids to download it: if you meant a "
            f"folder, there is no {self.name!r} here; else load once without that and with a network, or run "
            f"'{command}'"
        )

    def __repr__(self) -> str:
        return f"Source({self.name!r}, commit={self.commit!r})"

    def __str__(self) -> str:
        return f"{self.name} at {self.commit[:7]}"


def _checked_revision(revision: str | None) -> str:
    """The revision, if its name is one that git allows. Raises CheckpointNotFound."""
    if revision is None:
        return "main"
    odd = any(ord(char) <= 32 or ord(char) == 127 or char in "\\~^:?*[" for char in revision)
    odd = odd or revision.startswith(("/", "-", ".")) or revision.endswith("/") or ".." in revision
    if odd or not revision:
        raise CheckpointNotFound(
            f"{show(revision)} cannot be a revision: give a branch, a tag, a commit, or a pull request as "
            f"refs/pr/1"
        )
    return revision


@contextlib.contextmanager
def _one_warning(endpoint: str) -> Iterator[None]:
    """One sentence in place of the two lines that huggingface_hub logs before each repetition of a request."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    told = False

    def shorter(record: logging.LogRecord) -> bool:
        nonlocal told
        message = record.getMessage()
        if "thrown while requesting" not in message and not message.startswith("Retrying in "):
            return True
        first, told = not told, True
        record.msg, record.args = f"{endpoint} does not answer: trying again for up to half a minute", ()
        return first

    logger.addFilter(shorter)
    try:
        yield
    finally:
        logger.removeFilter(shorter)


def _progress_bar(enabled: bool) -> type:
    from huggingface_hub.utils.tqdm import tqdm

    base: Any = tqdm

    class LargeFilesOnly(base):  # type: ignore[misc]
        """huggingface_hub's progress bar, hidden for small files."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if not enabled or (kwargs.get("total") or MIN_PROGRESS_BYTES) < MIN_PROGRESS_BYTES:
                kwargs["disable"] = True
            super().__init__(*args, **kwargs)

    return LargeFilesOnly
