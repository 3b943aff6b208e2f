"""What the commands perplexity, inspect and recall share: reading texts, progress bars, writing numbers."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import Tensor, nn

    from streamllm.commands.loading import ModelChoice
    from streamllm.evaluate.result import Result
    from streamllm.tokenizer import Tokenizer


def read_texts(
    tokenizer: Tokenizer, files: Sequence[Path], *, separate: bool = False, limit: int | None = None
) -> list[Tensor]:
    """The tokens of `files`, or of the held-out modules of Python's standard library where there are none.

    One stream, int64 [N]; with `separate`, each text alone. At most `limit` tokens in all. Raises UsageError
    for a file that is not UTF-8, and for fewer than two tokens.
    """
    from streamllm.evaluate.corpus import held_out_texts
    from streamllm.evaluate.texts import as_stream, as_texts, first_tokens

    texts = [_read_text(file) for file in files] or held_out_texts()
    tokens = as_texts(tokenizer, texts) if separate else [as_stream(tokenizer, texts)]
    tokens = tokens if limit is None else first_tokens(tokens, limit)
    if not tokens or min(map(len, tokens)) < 2:
        raise click.UsageError("the text has fewer than two tokens: nothing can be predicted in it")
    return tokens


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{file} is not UTF-8: {error}") from None


def picture_title(chosen: ModelChoice, samples: str, files: Sequence[Path] | None = None) -> str:
    """The title of a picture: model, samples, and the names of the texts, [] being the standard library."""
    name = chosen.name or "the embedded checkpoint"
    name = Path(name).resolve().name if Path(name).is_dir() else name
    if files is None:
        return f"{name} · {samples}"
    texts = ", ".join(file.name for file in files[:3]) or "Python's standard library"
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"{name} · {samples} of {texts}{more}"


def progress_bar(name: str, total: int | None = None) -> Any:
    """A tqdm bar on standard error, where that is a terminal. Without `total` it counts tokens."""
    from tqdm import tqdm

    return tqdm(total=total, desc=name, unit="tok" if total is None else "", disable=None, leave=False)


def check_memory(model: nn.Module, sinks: int, window: int | None, quantize: str | None = None) -> None:
    """Raises MemoryError before the long work, where the cache that it will need does not fit."""
    from streamllm import SinkCache

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the work itself warns
        SinkCache(model, sinks, window, quantize=quantize)


def show_scores(bar: Any) -> Callable[[Result], None]:
    """A function for `progress` of `perplexity`: it moves the bar and shows the perplexity so far."""
    before = 0

    def show(result: Result) -> None:
        nonlocal before
        bar.total = result.total if bar.total is None else bar.total
        before = 0 if result.tokens < before else before  # the next run has begun
        bar.set_postfix_str(f"perplexity {result.perplexity:.4g}", refresh=False)
        bar.update(result.tokens - before)
        before = result.tokens

    return show


def write_json(file: Path | None, content: dict[str, Any], chosen: ModelChoice) -> None:
    """Write the numbers of a command, with the model's name and type, where --json is given.

    If the file cannot be written after all, they go into a new file in the temporary folder, and the OSError names it.
    """
    if file is None:
        return
    content = {"model": chosen.name or "embedded", "dtype": chosen.precision, **content}
    text = json.dumps(content, indent=1) + "\n"
    try:
        file.write_text(text)
    except OSError as error:
        handle, kept = tempfile.mkstemp(prefix="streamllm-", suffix=".json")
        with os.fdopen(handle, "w") as out:
            out.write(text)
        raise OSError(f"{file} cannot be written ({error.strerror}); the numbers are in {kept}") from error
