"""Make every table and picture of the README from the embedded checkpoint, or from another one.

    python tools/report.py                        # into tools/report/, about five minutes on one core

Writes report.md (tables with their settings, and pictures), report.json (the numbers) and the pictures, each
for light and for dark pages.
"""

import json
import math
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

import streamllm
from streamllm.evaluate import (
    Bucket,
    Comparison,
    Recall,
    Result,
    attention,
    compare,
    passkey,
    perplexity,
    plots,
    recommend,
    stream_eval,
)
from streamllm.evaluate.corpus import held_out_texts, training_texts
from streamllm.evaluate.texts import as_stream, samples
from streamllm.models.step import geometry_of
from streamllm.status import resident_bytes


@dataclass
class Report:
    """The report, which the functions below extend one after the other."""

    folder: Path
    lines: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

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

    def write(self) -> None:
        (self.folder / "report.md").write_text("\n".join(self.lines))
        (self.folder / "report.json").write_text(json.dumps(self.numbers, indent=1) + "\n")


@dataclass(frozen=True)
class Subject:
    """The model, and the text that it is measured on."""

    model: nn.Module
    tokenizer: streamllm.Tokenizer
    stream: Tensor  # held-out text, int64 [N]
    span: int  # sinks + window
    sinks: int
    scale: float

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


def modes(report: Report, subject: Subject) -> None:
    """Perplexity of the four modes on one text."""
    S, W, span, stream = subject.sinks, subject.window, subject.span, subject.stream
    trained = geometry_of(subject.model).trained_length
    dense, positions = stream[: subject.scaled(32_768, 2048)], subject.scaled(3000)
    results = [
        subject.score(mode="dense", stream=dense),
        subject.score(mode="window", window=span),
        subject.score(mode="sinks", sinks=S, window=W),
        subject.score(mode="recompute", sinks=S, window=W, positions=positions),
    ]
    pieces = [
        torch.cat((stream[:1], stream[start : start + span - 1]))
        for start in range(1, len(dense) - span, span)
    ]
    fresh = subject.score(mode="dense", stream=pieces)
    starts = [span * times for times in (1, 4, 16, 64, 256)]

    def cell(bucket: Bucket) -> str:
        return f"{bucket.perplexity:.4g}" if bucket.tokens >= plots.MIN_PREDICTIONS else "–"

    def cells(result: Result) -> list[str]:
        within_span = result.between(1, span // 2 + 1)  # a bucket ends at twice its start
        later = [result.between(start, stop) for start, stop in pairwise([*starts, math.inf])]
        return [cell(bucket) for bucket in (within_span, *later)]

    report.table(
        f"Perplexity by position in the text, {len(stream):,} held-out tokens as one stream, never reset. "
        f"Trained length {trained or 'any'}; windows count the token itself. Dense reads {len(dense):,} "
        f"tokens; re-computation is scored at {positions:,} random positions.",
        ["", f"< {span}", *(f"from {start:,}" for start in starts), f"all beyond {2 * span}"],
        [
            [
                plots.label(result),
                *cells(result),
                f"{result.beyond(2 * span).perplexity:.4g}",
            ]
            for result in results
        ],
    )
    report.add(
        f"For comparison: the first {len(dense):,} tokens, cut into pieces of {span} that are read densely, each "
        f"with its own BOS in front, have a perplexity of {fresh.perplexity:.4g}."
    )
    report.picture(
        "perplexity",
        "Perplexity by position for dense, window, sinks and re-computation",
        lambda dark: plots.perplexity_curves(results, trained_length=trained, dark=dark),
    )
    report.numbers["pieces"] = fresh.to_dict()
    report.numbers["modes"] = [result.to_dict() for result in results]


def against_recomputation(report: Report, subject: Subject) -> None:
    """How much worse streaming is than re-computation, prediction by prediction."""
    found: Comparison = compare(
        subject.model, subject.stream, sinks=subject.sinks, window=subject.window,
        positions=subject.scaled(5000, 50),
    )  # fmt: skip
    drift = ", ".join(f"{value:+.3f}" for value in found.eighths)
    report.add(
        f"Streaming against re-computation with the same {found.sinks} sinks and window {found.window}, at "
        f"{found.tokens:,} random positions of {len(subject.stream):,} tokens: "
        f"{found.difference:+.4f} ± {found.error:.4f} nats per token, perplexity × {found.ratio:.4f}. "
        f"By eighths of the text: {drift}."
    )
    report.numbers["against re-computation"] = {**asdict(found), "error": found.error, "ratio": found.ratio}


def ablations(report: Report, subject: Subject) -> None:
    """Perplexity by the number of sinks, and by the length of the window."""
    span = subject.span
    stream = subject.stream[: subject.scaled(100_000, 4 * span + 1)]
    with tqdm(total=None, desc="sinks", disable=None, leave=False):
        found = recommend(subject.model, stream, span=span)
    report.table(
        f"Sinks, in a cache of sinks + window = {span}: perplexity beyond position {2 * span} of "
        f"{len(stream):,} held-out tokens. The smallest number within 1 % of the best: {found.sinks}.",
        ["sinks", *map(str, found.scores())],
        [["perplexity", *(f"{score:.4g}" for score in found.scores().values())]],
    )
    spans = [span // 16, span // 8, span // 4, span // 2, span, 2 * span, 4 * span]
    spans = [some for some in spans if some > subject.sinks]
    # The table shows on purpose what happens beyond the trained length.
    warnings.filterwarnings("ignore", "sinks . window = ")
    results = [subject.score(stream, sinks=subject.sinks, window=some - subject.sinks) for some in spans]
    report.table(
        f"Windows with {subject.sinks} sinks: perplexity beyond position {4 * span} of {len(stream):,} "
        f"held-out tokens. Beyond the trained length, {geometry_of(subject.model).trained_length or 'any'}, "
        f"there are distances that the model was not trained on.",
        ["window", *(str(result.window) for result in results)],
        [["perplexity", *(f"{result.beyond(4 * span).perplexity:.4g}" for result in results)]],
    )
    report.numbers["sinks"] = {"recommended": found.sinks, "perplexity": found.scores()}
    report.numbers["windows"] = [result.to_dict() for result in results]


def where_attention_goes(report: Report, subject: Subject) -> None:
    """The heat map, and the share of attention on the first tokens."""
    count, length = subject.scaled(64, 2), min(64, subject.span)
    seen = attention(subject.model, samples(subject.tokenizer, subject.stream, count, length))
    share = seen.first(8)
    report.table(
        f"Share of attention that the later half of {length} tokens pays to each of the first eight, in %; "
        f"mean of the heads, {count} held-out texts.",
        ["layer", *map(str, range(share.shape[2]))],
        [[str(n), *(f"{100 * s:.1f}" for s in layer)] for n, layer in enumerate(share.mean(1).tolist())],
    )
    report.picture(
        "attention",
        "Attention by query and key, and the share of every head on the first token",
        lambda dark: plots.attention_map(seen, dark=dark),
    )
    report.numbers["attention"] = share.tolist()


def recall_by_distance(report: Report, subject: Subject) -> None:
    """Recall of facts inside the window and beyond it."""
    given: dict[str, Any] = {"sinks": subject.sinks, "window": subject.window, "wording": "code", "digits": 2}
    curves: dict[str, Sequence[Recall]] = {
        "StreamEval": stream_eval(
            subject.model, subject.tokenizer, every=2, lines=subject.scaled(1000, 100), **given
        ),
        "passkey": passkey(subject.model, subject.tokenizer, samples=subject.scaled(200, 2), **given),
    }
    for name, scores in curves.items():
        report.table(
            f"{name}, {subject.sinks} sinks + window {subject.window}, "
            f"{min(score.questions for score in scores)} questions or more at each distance. An answer is right "
            f"if greedy decoding gives both digits of its number (by chance: about 1 %).",
            ["tokens back", *(f"{score.distance:.0f}" for score in scores)],
            [
                ["right, %", *(f"{100 * score.accuracy:.1f}" for score in scores)],
                ["tokens right, %", *(f"{100 * score.token_accuracy:.1f}" for score in scores)],
                ["nats per token", *(f"{score.mean:.2f}" for score in scores)],
            ],
        )
    report.picture(
        "recall",
        "Right answers and nats per token by distance, with the end of the window",
        lambda dark: plots.recall_curves(curves, window=subject.window, dark=dark),
    )
    report.numbers["recall"] = {name: [asdict(score) for score in scores] for name, scores in curves.items()}


def speed(report: Report, subject: Subject, folder: Path) -> None:
    """Scoring in exact chunks against one token at a time, here and in transformers."""
    S, W, stream = subject.sinks, subject.window, subject.stream
    short, long = stream[: subject.scaled(2000, 2 * subject.span)], stream[: subject.scaled(100_000, 4096)]
    rows: list[tuple[str, Tensor, Callable[[Tensor], object]]] = [
        ("exact chunks of 256", long, lambda text: subject.score(text, sinks=S, window=W)),
        ("one token per forward", short, lambda text: subject.score(text, sinks=S, window=W, chunk=1)),
    ]
    theirs = _transformers(folder, next(subject.model.parameters()).dtype)
    if theirs is not None:
        rows.append(
            ("transformers, one token per forward", short, lambda text: _their_loop(theirs, text, S, W - 1))
        )
    rates = {}
    for name, text, score in rows:
        score(text[: 2 * subject.span])  # warm-up
        started = time.perf_counter()
        score(text)
        rates[name] = (len(text) - 1) / (time.perf_counter() - started)
    fastest = rates["exact chunks of 256"]
    report.table(
        f"Speed of scoring with {S} sinks and window {W}, {torch.get_num_threads()} CPU thread(s), "
        f"{next(subject.model.parameters()).dtype}. The loop over transformers cuts its cache as "
        f"streaming-llm's eval_long_ppl.py does, but does not rotate all keys again for every token.",
        ["", "tokens/s", "chunks are faster by"],
        [[name, f"{rate:,.0f}", f"{fastest / rate:.1f} ×"] for name, rate in rates.items()],
    )
    report.numbers["tokens per second"] = rates


def _transformers(folder: Path, dtype: torch.dtype) -> Any:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@torch.no_grad()
def _their_loop(model: Any, text: Tensor, start: int, recent: int) -> float:
    """One token per forward; the cache is cut to start + recent after each."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    nll = 0.0
    for place in range(len(text) - 1):
        logits = model(input_ids=text[None, place, None], past_key_values=cache, use_cache=True).logits
        nll += float(torch.nn.functional.cross_entropy(logits[0].float(), text[place + 1, None]))
        for layer in cache.layers:
            if layer.keys.shape[2] > start + recent:
                layer.keys = torch.cat((layer.keys[:, :, :start], layer.keys[:, :, -recent:]), 2)
                layer.values = torch.cat((layer.values[:, :, :start], layer.values[:, :, -recent:]), 2)
    return nll


def memory(report: Report, subject: Subject, tokens: int) -> None:
    """Memory of this process, and speed, along a text of `tokens` tokens."""
    read = as_stream(subject.tokenizer, [*held_out_texts(), *training_texts()])
    read = read.repeat(-(-tokens // len(read)))[:tokens]
    marks = [tokens // 100, tokens // 10, tokens]
    found: list[dict[str, float]] = []
    before, started = 0, time.perf_counter()

    def progress(result: Result) -> None:
        nonlocal before, started
        if result.tokens >= marks[len(found)] - 1:
            now = time.perf_counter()
            rate = (result.tokens - before) / (now - started)
            found.append({"tokens": marks[len(found)], "memory": resident_bytes() or 0, "rate": rate})
            before, started = result.tokens, now

    result = perplexity(subject.model, read, sinks=subject.sinks, window=subject.window, progress=progress)
    report.table(
        f"One stream of {tokens:,} tokens ({subject.sinks} sinks, window {subject.window}): resident memory "
        f"of the process at that place, and speed since the place before. The text is the standard library; "
        f"the model was trained on most of it. Perplexity {result.perplexity:.4g}.",
        ["after tokens", *(f"{mark['tokens']:,}" for mark in found)],
        [
            ["resident memory, MiB", *(f"{mark['memory'] / 2**20:,.1f}" for mark in found)],
            ["tokens/s", *(f"{mark['rate']:,.0f}" for mark in found)],
        ],
    )
    report.numbers["memory"] = found


@click.command()
@click.option("--model", "-m", metavar="NAME|FOLDER", help="[default: the embedded model]")
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "report")
@click.option("--sinks", type=click.IntRange(0), default=4, show_default=True)
@click.option("--span", type=click.IntRange(16), help="Sinks + window.  [default: the trained length]")
@click.option("--long", "long_tokens", type=click.IntRange(0), default=1_000_000, show_default=True,
              help="Tokens of the memory run; 0: no memory run.")  # fmt: skip
@click.option(
    "--tokens", type=click.IntRange(2), help="Read at most so many held-out tokens.  [default: all]"
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--scale",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    help="Shorten every text by this factor.",
)
def main(
    model: str | None,
    out: Path,
    sinks: int,
    span: int | None,
    long_tokens: int,
    tokens: int | None,
    threads: int,
    scale: float,
) -> None:
    """Make every table and picture of the README."""
    from streamllm.loading import open_source

    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    loaded, tokenizer = streamllm.load(model, device="cpu")
    trained = geometry_of(loaded).trained_length
    stream = as_stream(tokenizer, held_out_texts())[:tokens]
    subject = Subject(loaded, tokenizer, stream, span or min(1024, trained or 1024), sinks, scale)
    report = Report(out)
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    report.add(
        f"{model or 'The embedded checkpoint'}: {parameters:,} parameters, "
        f"{next(loaded.parameters()).dtype}, trained for {trained or 'any number of'} tokens. Held out: "
        f"{len(stream):,} tokens of the standard library of Python {platform.python_version()}. "
        f"torch {torch.__version__}. Made by tools/report.py."
    )
    if long_tokens:  # first, before anything else has used memory
        memory(report, subject, long_tokens)
    speed(report, subject, open_source(model).file("config.json").parent)
    modes(report, subject)
    against_recomputation(report, subject)
    ablations(report, subject)
    where_attention_goes(report, subject)
    recall_by_distance(report, subject)
    report.write()


if __name__ == "__main__":
    main()
