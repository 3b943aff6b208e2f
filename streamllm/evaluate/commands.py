"""`streamllm perplexity`, `streamllm inspect` and `streamllm recall`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from torch import Tensor, nn

from streamllm.evaluate import plots, scoring
from streamllm.evaluate.inspect import attention
from streamllm.evaluate.inspect import recommend as recommend_sinks
from streamllm.evaluate.recall import WORDINGS, Recall, passkey, stream_eval
from streamllm.evaluate.scoring import MODES, Result
from streamllm.evaluate.texts import as_stream, as_texts, samples
from streamllm.models.step import geometry_of
from streamllm.tokenizer import Tokenizer

SAVE_EVERY = 30.0  # seconds between two states of an unfinished run on disk
SMALL = 20_000_000  # parameters below which threads wait for each other longer than they work

Command = TypeVar("Command", bound=Callable[..., Any])


class Numbers(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """Whole numbers with commas between them."""

    name = "N,N,…"

    def __init__(self, least: int) -> None:
        self.least = least

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or min(numbers) < self.least:
            self.fail(
                f"{value!r} is not a list of numbers of at least {self.least}, like 4 or 0,4,8", param, ctx
            )
        return numbers


class Modes(click.ParamType):  # type: ignore[type-arg]
    """Names of modes with commas between them, or "all"."""

    name = "MODE,MODE,…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        modes = MODES if value == "all" else tuple(str(value).split(","))
        if unknown := [mode for mode in modes if mode not in MODES]:
            self.fail(f"{unknown[0]!r} is not one of {', '.join(MODES)}, all", param, ctx)
        return modes


def with_model(command: Command) -> Command:
    """The options that say which model, and where it runs."""
    for option in (
        click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: 1 for small models]"),
        click.option("--device", help="cpu, cuda, mps.  [default: the best there is]"),
        click.option(
            "--dtype", default="auto", show_default=True, help="float32, bfloat16, float16, float64."
        ),
        click.option("--revision", help="Branch, tag or commit of a hub repository."),
        click.option(
            "--model", "-m", metavar="NAME|FOLDER", help="Hub name or folder.  [default: the embedded model]"
        ),
    ):
        command = option(command)
    return command


def with_output(command: Command) -> Command:
    """The options that say where results go besides standard output."""
    for option in (
        click.option(
            "--plot",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Draw a picture: .png, .svg, .pdf.",
        ),
        click.option(
            "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the numbers."
        ),
    ):
        command = option(command)
    return command


text_files = click.argument(
    "files", nargs=-1, metavar="[TEXT_FILE]…", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)


@click.command()
@text_files
@with_model
@click.option(
    "--mode", type=Modes(), default="sinks", show_default=True, help="sinks, window, dense, recompute; all."
)
@click.option("--sinks", type=Numbers(0), default="4", show_default=True, help="First tokens that stay.")
@click.option(
    "--window",
    type=Numbers(1),
    help="Recent tokens that stay.  [default: 1020, or what the model was trained for]",
)
@click.option(
    "--quantize-cache",
    "quantize",
    type=click.Choice(["int8"]),
    help="Store recent keys and values in 8 bits.",
)
@click.option("--quantize", "weights", type=click.Choice(["int8"]), help="Round the weights to 8 bits.")
@click.option("--tokens", type=click.IntRange(2), help="Read no more than so many tokens.  [default: all]")
@click.option("--reset-between-texts", is_flag=True, help="Begin every text with an empty cache.")
@click.option("--chunk", type=click.IntRange(1), default=256, show_default=True, help="Tokens read at once.")
@click.option(
    "--dense-tokens", type=click.IntRange(2), default=16384, show_default=True,
    help="How much the dense mode reads: its memory grows with it.",
)  # fmt: skip
@click.option(
    "--positions", type=click.IntRange(0), default=2000, show_default=True,
    help="Random predictions that recompute scores; 0: all of them.",
)  # fmt: skip
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="… so many at a time.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--resume", type=click.Path(dir_okay=False, path_type=Path),
    help="Keep the state of the run in this file, and go on from it if it is there.",
)  # fmt: skip
@with_output
def perplexity(
    files: tuple[Path, ...], model: str | None, revision: str | None, dtype: str, device: str | None,
    threads: int | None, mode: tuple[str, ...], sinks: tuple[int, ...], window: tuple[int, ...] | None,
    quantize: str | None, weights: str | None, tokens: int | None, reset_between_texts: bool, chunk: int,
    dense_tokens: int, positions: int, batch: int, seed: int, resume: Path | None, json_file: Path | None,
    plot: Path | None,
) -> None:  # fmt: skip
    """Score a stream: perplexity under four ways of attending to it.

    \b
    sinks      the first --sinks tokens and the last --window
    window     the last --window only
    dense      everything before
    recompute  as sinks, but read afresh for every token: slow, and the best there is

    --mode, --sinks and --window take several values with commas between; every combination is run. The
    window counts the token itself: the paper's 4 + 1020 is --sinks 4 --window 1021. Without a text, the
    held-out modules of Python's standard library are read, which the embedded model never saw.

    The columns are perplexities by position: 128 stands for the predictions at 128 … 255.
    """
    plots.check_path(plot)
    loaded, tokenizer = _load(model, revision, dtype, device, threads, weights)
    texts = _texts(tokenizer, files, reset_between_texts, tokens)
    settings = _settings(mode, sinks, window, quantize)
    precision = dtype if weights is None else f"{dtype}, {weights} weights"
    run = _Run(loaded, resume, _fingerprint(model, precision, texts, chunk, dense_tokens, positions, seed))
    results = []
    for one in settings:
        read = _cut(texts, dense_tokens) if one.mode == "dense" else texts
        scored = positions if one.mode == "recompute" and positions > 0 else None
        results.append(run.score(one, read, chunk=chunk, positions=scored, seed=seed, batch=batch))
    run.finish()
    click.echo(table(results))
    _write(json_file, {"results": [result.to_dict() for result in results]}, model, precision)
    if plot is not None:
        trained = geometry_of(loaded).trained_length
        plots.save_figure(plots.perplexity_curves(results, trained_length=trained), plot)


@click.command()
@text_files
@with_model
@click.option(
    "--samples", "count", type=click.IntRange(1), default=32, show_default=True, help="Stretches of text."
)
@click.option("--length", type=click.IntRange(16), default=64, show_default=True, help="Tokens of each.")
@click.option(
    "--sinks", type=Numbers(0), default="0,1,2,4,8", show_default=True, help="Numbers of sinks to try."
)
@click.option(
    "--span",
    type=click.IntRange(2),
    help="Sinks + window.  [default: what the model was trained for, ≤ 1024]",
)
@click.option(
    "--tokens", type=click.IntRange(2), default=50_000, show_default=True, help="Tokens read for each."
)
@click.option("--chunk", type=click.IntRange(1), default=256, show_default=True, help="Tokens read at once.")
@click.option("--seed", type=int, default=0, show_default=True)
@with_output
def inspect(
    files: tuple[Path, ...], model: str | None, revision: str | None, dtype: str, device: str | None,
    threads: int | None, count: int, length: int, sinks: tuple[int, ...], span: int | None, tokens: int,
    chunk: int, seed: int, json_file: Path | None, plot: Path | None,
) -> None:  # fmt: skip
    """Show where attention goes, and how many sinks a model needs.

    The table is the share of attention that later tokens pay to each of the first eight, by layer (mean of
    the heads); --plot draws every head. Then the text is streamed with several numbers of sinks beside a
    window that fills the same cache, and the fewest that come within 1 % of the best are recommended.
    """
    plots.check_path(plot)
    loaded, tokenizer = _load(model, revision, dtype, device, threads)
    stream = _texts(tokenizer, files, False, None)[0]
    with _bar("attention", count) as bar:
        seen = attention(
            loaded, samples(tokenizer, stream, count, length, seed), progress=lambda done, _: bar.update(1)
        )
    share = seen.first(8)  # [L, H, 8]
    click.echo(f"Share of attention on the first tokens, {count} texts of {length} tokens, in %\n")
    rows = [
        [f"layer {n}", *(f"{100 * s:.1f}" for s in layer)] for n, layer in enumerate(share.mean(1).tolist())
    ]
    rows.append(["all", *(f"{100 * s:.1f}" for s in share.mean((0, 1)).tolist())])
    click.echo(_columns([["token", *map(str, range(share.shape[2]))], *rows]))
    with _bar("sinks", len(set(sinks)) * (min(tokens, len(stream)) - 1)) as bar:
        found = recommend_sinks(
            loaded, stream[:tokens], sinks=sorted(set(sinks)), span=span, chunk=chunk, progress=_follow(bar)
        )
    scores = found.scores()
    click.echo(f"\nPerplexity beyond twice the cache, sinks + window = {found.span}\n")
    click.echo(
        _columns([["sinks", *map(str, scores)], ["perplexity", *(f"{s:.4g}" for s in scores.values())]])
    )
    click.echo(f"\nThis model needs {_plural(found.sinks, 'sink')}: {_because(found.sinks, scores)}.")
    _write(
        json_file,
        {
            "share": share.tolist(),
            "recommended_sinks": found.sinks,
            "span": found.span,
            "sweep": [result.to_dict() for result in found.sweep],
        },
        model,
        dtype,
    )
    if plot is not None:
        plots.save_figure(plots.attention_map(seen), plot)


@click.command()
@with_model
@click.option("--mode", type=click.Choice(["sinks", "window", "dense"]), default="sinks", show_default=True)
@click.option("--sinks", type=click.IntRange(0), default=4, show_default=True, help="First tokens that stay.")
@click.option(
    "--window",
    type=click.IntRange(1),
    help="Recent tokens that stay.  [default: 1020, or what the model was trained for]",
)
@click.option("--back", type=Numbers(1), help="StreamEval: lines back.  [default: ¼ to 2 windows]")
@click.option(
    "--lines", type=click.IntRange(2, 1600), default=500, show_default=True, help="StreamEval: lines told."
)
@click.option(
    "--every",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="StreamEval: lines between questions.",
)
@click.option("--distances", type=Numbers(1), help="Passkey: tokens back.  [default: ¼ to 2 windows]")
@click.option(
    "--samples", "count", type=click.IntRange(1), default=20, show_default=True, help="Passkey: texts each."
)
@click.option("--digits", type=click.IntRange(1), default=5, show_default=True, help="… of an answer.")
@click.option(
    "--wording", type=click.Choice(list(WORDINGS)), help="[default: code for the embedded model, else lines]"
)
@click.option("--chunk", type=click.IntRange(1), default=256, show_default=True, help="Tokens read at once.")
@click.option("--seed", type=int, default=0, show_default=True)
@with_output
def recall(
    model: str | None, revision: str | None, dtype: str, device: str | None, threads: int | None, mode: str,
    sinks: int, window: int | None, back: tuple[int, ...] | None, lines: int, every: int,
    distances: tuple[int, ...] | None, count: int, digits: int, wording: str | None, chunk: int, seed: int,
    json_file: Path | None, plot: Path | None,
) -> None:  # fmt: skip
    """Show what a stream remembers, by distance, and what it does not.

    StreamEval tells facts, one per line, and asks every 10 lines for one that stood so many lines before (20
    in the paper); the passkey test hides one fact in filler. What has left the window is forgotten: sinks
    keep a stream fluent, they do not make its memory longer.
    """
    plots.check_path(plot)
    loaded, tokenizer = _load(model, revision, dtype, device, threads)
    wording = wording or ("code" if model is None else "lines")
    held = scoring.new_cache(loaded, mode, 0 if mode == "window" else sinks, window, chunk).window
    given: dict[str, Any] = {
        "wording": wording, "digits": digits, "seed": seed, "mode": mode, "sinks": sinks, "window": held,
        "chunk": chunk,
    }  # fmt: skip
    with _bar("StreamEval", None) as bar:
        asked = stream_eval(
            loaded, tokenizer, back=back, lines=lines, every=every, progress=lambda *_: bar.update(1), **given
        )
    with _bar("passkey", None) as bar:
        hidden = passkey(
            loaded, tokenizer, distances=distances, samples=count, progress=lambda *_: bar.update(1), **given
        )
    what = (
        "dense"
        if mode == "dense"
        else f"window {held}"
        if mode == "window"
        else f"{sinks} sinks + window {held}"
    )
    click.echo(f"StreamEval, {lines} lines, a question every {every}, {what}\n")
    click.echo(recall_table(asked))
    click.echo(f"\nPasskey, {count} texts each, {what}\n")
    click.echo(recall_table(hidden))
    if mode != "dense":
        click.echo(
            f"\nA fact more than {held} tokens back has left the window; no number of sinks brings it back."
        )
    curves = {"StreamEval": asked, "passkey": hidden}
    _write(
        json_file,
        {name: [asdict(s) for s in scores] for name, scores in curves.items()} | given,
        model,
        dtype,
    )
    if plot is not None:
        figure = plots.recall_curves(curves, window=None if mode == "dense" else held)
        plots.save_figure(figure, plot)


def table(results: Sequence[Result]) -> str:
    """Perplexity by bucket of position, one line for each result, aligned."""
    spans = [result.sinks + result.window for result in results if result.mode != "dense"] or [128]
    first = max(1, 1 << (min(spans).bit_length() - 1))  # what stands before is one column
    starts = sorted(
        {bucket.start for result in results for bucket in result.buckets if bucket.start >= first}
    )
    rows = [["", "sinks", "window", "tokens", "all", f"< {first}", *map(str, starts)]]
    for result in results:
        by_start = {bucket.start: bucket for bucket in result.buckets}
        head = replace(result, buckets=tuple(b for b in result.buckets if b.start < first)).beyond(1)
        cells = [result.perplexity, head.perplexity]
        cells += [by_start[start].perplexity if start in by_start else float("nan") for start in starts]
        mode = result.mode if result.quantize is None else f"{result.mode}, {result.quantize}"
        name = [mode, str(result.sinks), "–" if result.mode == "dense" else str(result.window)]
        rows.append([*name, str(result.tokens), *("–" if cell != cell else f"{cell:.4g}" for cell in cells)])
    return _columns(rows)


def recall_table(scores: Sequence[Recall]) -> str:
    """One column for each distance."""
    rows = [
        ["tokens back", *(f"{score.distance:.0f}" for score in scores)],
        ["questions", *(str(score.questions) for score in scores)],
        ["right, %", *(f"{100 * score.accuracy:.1f}" for score in scores)],
        ["tokens right, %", *(f"{100 * score.token_accuracy:.1f}" for score in scores)],
        ["nats per token", *(f"{score.mean:.2f}" for score in scores)],
    ]
    if any(score.lines is not None for score in scores):
        rows.insert(0, ["lines back", *(str(score.lines) for score in scores)])
    return _columns(rows)


@dataclass(frozen=True)
class _Setting:
    mode: str
    sinks: int
    window: int | None
    quantize: str | None

    @property
    def key(self) -> str:
        key = f"{self.mode} {self.sinks} {self.window}"
        return key if self.quantize is None else f"{key} {self.quantize}"


def _settings(
    modes: Iterable[str], sinks: Iterable[int], windows: Iterable[int] | None, quantize: str | None
) -> list[_Setting]:
    """Every combination once; what a mode does not look at makes no difference."""
    chosen: dict[_Setting, None] = {}
    for mode in modes:
        for window in (None,) if mode == "dense" or windows is None else windows:
            for count in (0,) if mode in ("dense", "window") else sinks:
                chosen[_Setting(mode, count, window, None if mode == "recompute" else quantize)] = None
    return list(chosen)


class _Run:
    """Several settings, one after the other, with what is done kept in a file.

    FILE holds the finished results, FILE.cache the one under way with its keys and values.
    """

    def __init__(self, model: nn.Module, file: Path | None, fingerprint: str) -> None:
        self.model, self.file, self.fingerprint = model, file, fingerprint
        self.finished: dict[str, Result] = {}
        if file is not None and file.exists():
            state = json.loads(file.read_text())
            if state.get("fingerprint") != fingerprint:
                raise click.UsageError(
                    f"{file} belongs to a run with another model, text or setting: "
                    f"give the same again, or another file to --resume"
                )
            self.finished = {key: Result.from_dict(plain) for key, plain in state["finished"].items()}
        self.part = None if file is None else file.with_name(file.name + ".cache")

    def score(self, setting: _Setting, texts: list[Tensor], **arguments: Any) -> Result:
        if setting.key in self.finished:
            return self.finished[setting.key]
        resume, last, saved = self._unfinished(setting), None, time.monotonic()

        def progress(result: Result) -> None:
            nonlocal last, saved
            last = result
            follow(result)
            if self.part is not None and time.monotonic() - saved > SAVE_EVERY and not result.done:
                self._save(setting, result)
                saved = time.monotonic()

        with _bar(setting.key.removesuffix(" None"), None) as bar:
            follow = _follow(bar)
            try:
                result = scoring.perplexity(
                    self.model, texts, mode=setting.mode, sinks=setting.sinks, window=setting.window,
                    quantize=setting.quantize, resume=resume, progress=progress, **arguments,
                )  # fmt: skip
            except KeyboardInterrupt:
                if self.part is not None and last is not None and not last.done:
                    self._save(setting, last)
                raise
        self.finished[setting.key] = result
        self._save(setting, None)
        return result

    def finish(self) -> None:
        if self.part is not None:
            self.part.unlink(missing_ok=True)

    def _unfinished(self, setting: _Setting) -> Result | None:
        state = {} if self.file is None or not self.file.exists() else json.loads(self.file.read_text())
        if self.part is None or state.get("under way") != setting.key or not self.part.exists():
            return None
        return scoring.load(self.model, self.part)

    def _save(self, setting: _Setting, result: Result | None) -> None:
        if self.file is None or self.part is None:
            return
        if result is not None:
            try:
                scoring.save(result, self.part)
            except ValueError:  # cut off in the middle of a chunk: the state saved before it still stands
                return
        state = {
            "fingerprint": self.fingerprint,
            "under way": None if result is None else setting.key,
            "finished": {key: done.to_dict() for key, done in self.finished.items()},
        }
        partial = self.file.with_name(self.file.name + ".partial")
        partial.write_text(json.dumps(state))
        partial.replace(self.file)


def _load(
    name: str | None,
    revision: str | None,
    dtype: str,
    device: str | None,
    threads: int | None,
    quantize: str | None = None,
) -> tuple[nn.Module, Tokenizer]:
    from streamllm import load

    model, tokenizer = load(name, revision=revision, dtype=dtype, device=device, quantize=quantize)
    if threads is None and sum(parameter.numel() for parameter in model.parameters()) < SMALL:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)
    return model, tokenizer


def _texts(tokenizer: Tokenizer, files: Sequence[Path], apart: bool, most: int | None) -> list[Tensor]:
    """What is read: one stream, or each text for itself; at most `most` tokens in all."""
    if files:
        try:
            texts = [file.read_text(encoding="utf-8") for file in files]
        except UnicodeDecodeError as error:
            raise click.UsageError(f"a text is not UTF-8: {error}") from None
    else:
        from streamllm.evaluate.corpus import held_out_texts

        texts = held_out_texts()
    tokens = as_texts(tokenizer, texts) if apart else [as_stream(tokenizer, texts)]
    tokens = tokens if most is None else _cut(tokens, most)
    if not tokens or min(map(len, tokens)) < 2:
        raise click.UsageError("the text has fewer than two tokens: nothing can be predicted in it")
    return tokens


def _cut(texts: Sequence[Tensor], most: int) -> list[Tensor]:
    """The first `most` tokens."""
    kept, left = [], most
    for text in texts:
        if left > 1:
            kept.append(text[:left])
        left -= len(text)
    return kept


def _fingerprint(model: str | None, dtype: str, texts: Sequence[Tensor], *numbers: int) -> str:
    digest = hashlib.sha256(repr((model, dtype, numbers, [len(text) for text in texts])).encode())
    for text in texts:
        digest.update(text.numpy().tobytes())
    return digest.hexdigest()


def _bar(name: str, total: int | None) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=name, unit="tok" if total is None else "", disable=None, leave=False)


def _follow(bar: Any) -> Callable[[Result], None]:
    """Moves a bar by what each score has more than the one before, and shows its perplexity."""
    before = 0

    def follow(result: Result) -> None:
        nonlocal before
        bar.total = result.total if bar.total is None else bar.total
        before = 0 if result.tokens < before else before  # the next setting has begun
        bar.set_postfix_str(f"perplexity {result.perplexity:.4g}", refresh=False)
        bar.update(result.tokens - before)
        before = result.tokens

    return follow


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _plural(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


def _because(needed: int, scores: dict[int, float]) -> str:
    best = min(scores.values())
    if not needed:
        return f"without any it is within 1 % of the best ({scores[min(scores)]:.4g} against {best:.4g})"
    fewer = max((count for count in scores if count < needed), default=None)
    reason = f"{scores[needed]:.4g} is within 1 % of the best ({best:.4g})"
    return reason if fewer is None else f"{reason}, {scores[fewer]:.4g} with {_plural(fewer, 'sink')} is not"


def _write(file: Path | None, content: dict[str, Any], model: str | None, dtype: str) -> None:
    if file is not None:
        file.write_text(
            json.dumps({"model": model or "embedded", "dtype": dtype, **content}, indent=1) + "\n"
        )
