"""The files of `streamllm batch`: one prompt per line, and one result per line, added as soon as it is known."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

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
        texts = path.read_text(encoding="utf-8").split("\n")
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

    Raises ValueError for a file that belongs to other lines or settings, or that is no file of results.
    """

    def __init__(self, path: Path, lines: Sequence[Line], retry_failed: bool = False) -> None:
        self._path = path
        keys = {line.number: line.key for line in lines}
        kept, self.done, self.failed = list[bytes](), set[int](), set[int]()
        whole = path.read_bytes() if path.exists() else b""
        *texts, unfinished = whole.split(b"\n")
        if unfinished[: len(BEGINNING)] != BEGINNING[: len(unfinished)]:
            raise _not_results(path)
        for text in texts:
            try:
                result = json.loads(text)
                number, key = result["line"], result["key"]
            except (ValueError, TypeError, KeyError):
                raise _not_results(path) from None
            if keys.get(number) != key:
                raise ValueError(
                    f"{path} belongs to another run: line {number} had other text or settings; give the same lines and "
                    f"settings again, or another --output"
                )
            if retry_failed and "error" in result:
                continue
            self._count(number, result)
            kept.append(text)
        left = b"".join(text + b"\n" for text in kept)
        if left != whole:
            partial = path.with_name(path.name + ".partial")
            partial.write_bytes(left)
            os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, line: Line, result: Mapping[str, Any]) -> None:
        """Write the result of a line. In one call, so that an interrupt leaves all of it or nothing."""
        entry = {"line": line.number, **line.copied, **result, "key": line.key}
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()
        self._count(line.number, result)

    def _count(self, number: int, result: Mapping[str, Any]) -> None:
        self.done.add(number)
        if "error" in result:
            self.failed.add(number)


def _not_results(path: Path) -> ValueError:
    return ValueError(f"{path} is not a file of results of this command: give another --output")
