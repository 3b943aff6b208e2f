"""The page that `tools/report.py` writes: sections of tables and pictures, and what was measured for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

import streamllm
from streamllm.evaluate import Result, perplexity, plots


@dataclass(frozen=True)
class Subject:
    """The model, and the texts that it is measured on."""

    model: nn.Module
    tokenizer: streamllm.Tokenizer
    stream: Tensor  # held-out text, int64 [N]
    choosing: (
        Tensor  # the text on which sinks and windows are compared; the held-out one if there is no other
    )
    span: int  # sinks + window
    spans: tuple[int, ...]  # sinks + window of the windows that are compared
    sinks: int
    scale: float
    name: str  # of the model
    text: str  # what the held-out text is
    choosing_text: str
    wording: str  # of questions: see streamllm.evaluate.WORDINGS

    @property
    def window(self) -> int:
        return self.span - self.sinks

    def scaled(self, count: int, minimum: int = 1) -> int:
        """`count` times the --scale of this report."""
        return max(minimum, int(count * self.scale))

    def score(self, stream: Tensor | list[Tensor] | None = None, **settings: Any) -> Result:
        tokens = self.stream if stream is None else stream
        with tqdm(total=None, desc=" ".join(map(str, settings.values())), disable=None, leave=False) as bar:

            def progress(result: Result) -> None:
                bar.total = result.total
                bar.n = result.tokens
                bar.set_postfix_str(f"perplexity {result.perplexity:.4g}")

            return perplexity(self.model, tokens, progress=progress, **settings)

    def title(self, samples: str) -> str:
        """The title of a picture: model, text, samples."""
        return f"{self.name} · {samples}"


@dataclass
class Report:
    """The report, section by section.

    state.json keeps finished sections, and what an interrupted section has measured so far. A section that is
    finished measures anew when it is asked for again.
    """

    folder: Path
    fingerprint: str  # of the model, the texts and the options: with another one, the report starts anew
    lines: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self._state.exists():
            return
        state = json.loads(self._state.read_text())
        if state["fingerprint"] == self.fingerprint:
            self.sections, self.measured = state["sections"], state["measured"]

    @property
    def _state(self) -> Path:
        return self.folder / "state.json"

    def save(self) -> None:
        """Write state.json."""
        partial = self._state.with_suffix(".partial")
        state = {"fingerprint": self.fingerprint, "sections": self.sections, "measured": self.measured}
        partial.write_text(json.dumps(state))
        partial.replace(self._state)

    def section(self, name: str, make: Callable[[], object]) -> None:
        """Make a section, and keep it."""
        self.lines, self.numbers = [], {}
        make()
        self.sections[name] = {"lines": self.lines, "numbers": self.numbers}
        self.measured = {
            key: value for key, value in self.measured.items() if not key.startswith(f"{name}: ")
        }
        self.save()

    def measure(self, section: str, what: str, compute: Callable[[], Any]) -> Any:
        """The result of `compute` as plain data; that of an interrupted run with the same settings, if there is one."""
        key = f"{section}: {what}"
        if key not in self.measured:
            self.measured[key] = json.loads(json.dumps(compute()))
            self.save()
        return self.measured[key]

    def result(self, section: str, subject: Subject, stream: Tensor | None = None, **settings: Any) -> Result:
        """The score of a text in one mode; see `measure`."""
        tokens = subject.stream if stream is None else stream
        what = f"{len(tokens)} tokens of {'held-out' if tokens is subject.stream else 'the'} text, {settings}"
        plain = self.measure(section, what, lambda: subject.score(tokens, **settings).to_dict())
        return Result.from_dict(plain)

    def add(self, text: str) -> None:
        """Add a paragraph, and print it."""
        self.lines += [text, ""]
        click.echo(text + "\n")

    def table(self, caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a Markdown table and its caption. The first column is aligned to the left."""
        ruler = ["---", *["---:"] * (len(head) - 1)]
        self.add("\n".join("| " + " | ".join(row) + " |" for row in (head, ruler, *rows)))
        self.add(f"*{caption}*")

    def picture(self, name: str, caption: str, draw: Callable[[bool], Any]) -> None:
        """Add a picture in two files, for light and for dark pages."""
        for dark in (False, True):
            plots.save_figure(draw(dark), self.folder / f"{name}-{'dark' if dark else 'light'}.png")
        self.add(
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{name}-dark.png">'
            f'<img src="{name}-light.png" alt="{caption}"></picture>'
        )

    def write(self, head: str, order: Sequence[str]) -> None:
        """Write report.md and report.json from all sections that are finished."""
        done = [self.sections[name] for name in order if name in self.sections]
        lines = [head, "", *(line for section in done for line in section["lines"])]
        numbers = {key: value for section in done for key, value in section["numbers"].items()}
        (self.folder / "report.md").write_text("\n".join(lines))
        (self.folder / "report.json").write_text(json.dumps(numbers, indent=1) + "\n")


def fingerprint(*parts: Any) -> str:
    """A digest of numbers, texts and tensors."""
    import hashlib

    digest = hashlib.sha256(torch.__version__.encode())
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return digest.hexdigest()
