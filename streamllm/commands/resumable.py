"""Several perplexity runs, one after the other, that can be continued after an interruption."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamllm.commands.evaluation import progress_bar, show_scores

if TYPE_CHECKING:
    from torch import Tensor, nn

    from streamllm.evaluate.result import Result

SAVE_EVERY = 30.0  # seconds between two saves of an unfinished run


@dataclass(frozen=True)
class Setting:
    """The settings of one run that make its result another one."""

    mode: str
    sinks: int
    window: int | None
    quantize: str | None

    def __str__(self) -> str:
        numbers = f"{self.mode} {self.sinks} {self.window}"
        return numbers if self.quantize is None else f"{numbers} {self.quantize}"


def combinations(
    modes: Iterable[str], sinks: Iterable[int], windows: Iterable[int] | None, quantize: str | None
) -> list[Setting]:
    """Every combination of the options once. A number that a mode ignores makes no combination of its own."""
    chosen: dict[Setting, None] = {}
    for mode in modes:
        for window in (None,) if mode == "dense" or windows is None else windows:
            for count in (0,) if mode in ("dense", "window") else sinks:
                chosen[Setting(mode, count, window, None if mode == "recompute" else quantize)] = None
    return list(chosen)


class ResumableRuns:
    """Scores settings one after the other, and keeps the state in a file, where one is given.

    FILE holds the finished results, FILE.cache the unfinished one with its keys and values.
    """

    def __init__(self, model: nn.Module, file: Path | None, fingerprint: str) -> None:
        from streamllm.evaluate.result import Result

        self._model, self._file, self._fingerprint = model, file, fingerprint
        self._finished: dict[str, Result] = {}
        self._cache_file = None if file is None else file.with_name(file.name + ".cache")
        if file is not None and file.exists():
            state = json.loads(file.read_text())
            if state.get("fingerprint") != fingerprint:
                raise click.UsageError(
                    f"{file} belongs to a run with another model, text or setting: "
                    f"give the same again, or another file to --resume"
                )
            self._finished = {key: Result.from_dict(plain) for key, plain in state["finished"].items()}

    def score(self, setting: Setting, texts: list[Tensor], **arguments: Any) -> Result:
        """The result of a setting: from the file, or computed. `arguments` are further ones of `perplexity`."""
        from streamllm.evaluate.scoring import perplexity

        if str(setting) in self._finished:
            return self._finished[str(setting)]
        last, saved = None, time.monotonic()

        def progress(result: Result) -> None:
            nonlocal last, saved
            last = result
            show(result)
            if time.monotonic() - saved > SAVE_EVERY and not result.done:
                self._save(setting, result)
                saved = time.monotonic()

        with progress_bar(str(setting).removesuffix(" None")) as bar:
            show = show_scores(bar)
            try:
                result = perplexity(
                    self._model, texts, mode=setting.mode, sinks=setting.sinks, window=setting.window,
                    quantize=setting.quantize, resume=self._unfinished(setting), progress=progress, **arguments,
                )  # fmt: skip
            except KeyboardInterrupt:
                if last is not None and not last.done:
                    self._save(setting, last)
                raise
        self._finished[str(setting)] = result
        self._save(setting, None)
        return result

    def finish(self) -> None:
        """Delete the keys and values. The results stay in the file."""
        if self._cache_file is not None:
            self._cache_file.unlink(missing_ok=True)

    def _unfinished(self, setting: Setting) -> Result | None:
        from streamllm.evaluate.saving import load

        if self._file is None or self._cache_file is None or not self._file.exists():
            return None
        state = json.loads(self._file.read_text())
        if state.get("under way") != str(setting) or not self._cache_file.exists():
            return None
        return load(self._model, self._cache_file)

    def _save(self, setting: Setting, unfinished: Result | None) -> None:
        from streamllm.evaluate.saving import save

        if self._file is None or self._cache_file is None:
            return
        if unfinished is not None:
            try:
                save(unfinished, self._cache_file)
            except ValueError:  # interrupted in the middle of a chunk: keep the state that was saved before
                return
        state = {
            "fingerprint": self._fingerprint,
            "under way": None if unfinished is None else str(setting),
            "finished": {key: done.to_dict() for key, done in self._finished.items()},
        }
        partial = self._file.with_name(self._file.name + ".partial")
        partial.write_text(json.dumps(state))
        partial.replace(self._file)


def fingerprint(model: str | None, dtype: str, texts: Sequence[Tensor], *numbers: int) -> str:
    """A digest of everything that a run's result depends on, apart from its Setting."""
    digest = hashlib.sha256(repr((model, dtype, numbers, [len(text) for text in texts])).encode())
    for text in texts:
        digest.update(text.numpy().tobytes())
    return digest.hexdigest()
