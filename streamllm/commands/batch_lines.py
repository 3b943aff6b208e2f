"""The files of `streamllm batch`: one prompt per line, and one result per line, added as soon as it is known."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BEGINNING = b'{"line": '  # of each line of results
# What a line may hold besides the settings of generation.
COPIED = ("id", "metadata")  # into the result
PROMPTS = ("prompt", "messages")
OPTIONS = ("max_new_tokens", "seed", "stop", "top_logprobs", "tools", "template_variables")


@dataclass(frozen=True)
class Line:
    """One line of the input: a prompt with its settings, or what is wrong with it."""

    number: int  # from 1
    key: str  # a digest of the line and of the settings for all lines
    prompt: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    copied: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


def read_lines(path: Path, known: Sequence[str], settings: Mapping[str, Any]) -> list[Line]:
    """The lines of a JSON-lines file that are not empty.

    known: the names of the settings of generation. settings: all else that the results depend on.
    """
    common = json.dumps(settings, sort_keys=True, default=str)
    found = []
    try:
        texts = path.read_text(encoding="utf-8-sig").split("\n")  # some editors write a BOM
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    for number, text in enumerate(texts, 1):
        if text.strip():
            key = hashlib.sha256(f"{common}\n{text.strip()}".encode()).hexdigest()[:16]
            found.append(_line(number, key, text, {*known, *OPTIONS}))
    return found


def _line(number: int, key: str, text: str, known: set[str]) -> Line:
    def wrong(reason: str, copied: Mapping[str, Any] | None = None) -> Line:
        return Line(number, key, copied=copied or {}, error=reason)

    try:
        entry = json.loads(text)
    except RecursionError:
        return wrong("the line is not a prompt: it is nested too deeply")
    except ValueError as error:
        return wrong(f"the line is not JSON: {error}")
    if not isinstance(entry, dict):
        return wrong('the line is not a JSON object: write {"prompt": "…"} or {"messages": […]}')
    copied = {name: entry[name] for name in COPIED if name in entry}
    given = [name for name in PROMPTS if name in entry]
    if len(given) != 1:
        return wrong(f"the line must have either {' or '.join(PROMPTS)}", copied)
    prompt, is_chat = entry[given[0]], given[0] == "messages"
    allowed = isinstance(prompt, list) if is_chat else isinstance(prompt, (str, list))
    if not allowed or (is_chat and not (prompt and all(isinstance(message, dict) for message in prompt))):
        what = "a list of messages" if is_chat else "a text or a list of token ids"
        return wrong(f"{given[0]} must be {what}", copied)
    settings = {name: value for name, value in entry.items() if name not in (*COPIED, *PROMPTS)}
    if unknown := sorted(set(settings) - known):
        return wrong(f'{unknown[0]} is not a setting; write data of your own under "metadata"', copied)
    if "logit_bias" in settings and isinstance(settings["logit_bias"], dict):  # JSON has names, not numbers
        try:
            settings["logit_bias"] = {int(name): bias for name, bias in settings["logit_bias"].items()}
        except ValueError:
            return wrong("logit_bias must map token ids to numbers", copied)
    return Line(number, key, prompt, settings, copied)


class Results:
    """The file of results. Each is added as soon as it is known. Opening the file removes an unfinished last line.

    Attributes:
        done: the numbers of the lines that have a result. failed: the numbers of those whose result is an error.

    The file is locked until the end of the `with`: a second process would compute the same lines again.

    Raises ValueError for a file that belongs to other lines or settings, that is no file of results, or to which
    another process writes.
    """

    def __init__(self, path: Path, lines: Sequence[Line], retry_failed: bool = False) -> None:
        self._path = path
        keys = {line.number: line.key for line in lines}
        self.done, self.failed = set[int](), set[int]()
        with contextlib.ExitStack() as files:
            self._file = files.enter_context(_locked(path))
            whole = (
                path.read_bytes() if path.is_file() else b""
            )  # not a pipe or a device, which may have no end
            left = self._known(whole, keys, retry_failed)
            if left != whole:
                partial = path.with_name(path.name + ".partial")
                partial.unlink(missing_ok=True)
                # The lock of the old file is kept: a process may have opened it just before.
                self._file = files.enter_context(_locked(partial))
                self._file.write(left)
                self._file.flush()
                os.replace(partial, path)
            self._files = files.pop_all()

    def _known(self, whole: bytes, keys: Mapping[int, str], retry_failed: bool) -> bytes:
        """Count the results in a file. Returns what stays of it."""
        path, kept = self._path, list[bytes]()
        *texts, unfinished = whole.split(b"\n")
        if unfinished[: len(BEGINNING)] != BEGINNING[: len(unfinished)]:
            raise _not_results(path)
        for text in texts:
            try:
                result = json.loads(text)
                number, key = result["line"], result["key"]
            except (ValueError, TypeError, KeyError, RecursionError):
                raise _not_results(path) from None
            if not isinstance(number, int):
                raise _not_results(path)
            if keys.get(number) != key:
                raise ValueError(
                    f"{path} belongs to another run: line {number} had other text or settings; give the same lines and "
                    f"settings again, or another --output"
                )
            if retry_failed and "error" in result:
                continue
            self._count(number, result)
            kept.append(text)
        return b"".join(text + b"\n" for text in kept)

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def add(self, line: Line, result: Mapping[str, Any]) -> None:
        """Write the result of a line. In one call, so that an interrupt leaves all of it or nothing."""
        entry = {"line": line.number, **line.copied, **result, "key": line.key}
        text = json.dumps(entry, ensure_ascii=False)
        try:
            written = text.encode()
        except UnicodeEncodeError:  # an id with half of a surrogate pair, which JSON can only escape
            written = json.dumps(entry).encode()
        self._file.write(written + b"\n")
        self._file.flush()
        self._count(line.number, result)

    def _count(self, number: int, result: Mapping[str, Any]) -> None:
        self.done.add(number)
        if "error" in result:
            self.failed.add(number)


def _locked(path: Path) -> BinaryIO:
    """The file, opened for appending. Raises ValueError where another process has it."""
    file = path.open("ab")
    if fcntl is not None and path.is_file():
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(
                f"another process writes to {path}: wait until it has ended, or give another --output"
            ) from None
        except OSError:  # a file system without locks
            pass
    return file


def _not_results(path: Path) -> ValueError:
    return ValueError(f"{path} is not a file of results of this command: give another --output")
