"""Make every table and picture of the README from the embedded checkpoint, or from another one.

    python tools/report.py                        # into tools/report/, about five minutes on one core
    python tools/report.py --model FOLDER --out NEW --text emma.txt --held-out persuasion.txt --part modes

Writes report.md (tables with their settings, and pictures), report.json (the numbers) and the pictures, each
for light and for dark pages. Without text files, the text is the standard library's. --part makes one part of
the report and keeps the others that were made before, also where --tokens, --scale, --long, --write or --seeds
were other ones: each part names its sizes. The same command continues an interrupted part.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import click
import torch
from report_endless import WRITERS, reading, speed, writing
from report_page import Report, Subject, fingerprint
from report_quality import ablations, against_recomputation, budgets, modes, where_attention_goes
from report_recall import recall_by_distance, ruler_by_distance

import streamllm
from streamllm.commands.types import NumbersParamType
from streamllm.evaluate.corpus import held_out_texts, training_texts
from streamllm.evaluate.texts import as_stream
from streamllm.models.step import geometry_of

PARTS = (
    "reading",
    "speed",
    "modes",
    "budgets",
    "against",
    "ablations",
    "attention",
    "recall",
    "ruler",
    "writing",
)
READABLE = click.Path(exists=True, dir_okay=False, path_type=Path)


def read_texts(files: tuple[Path, ...]) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in files]


def titles(files: tuple[Path, ...]) -> str:
    return ", ".join(path.stem.replace("_", " ").title() for path in files)


def processor() -> str:
    """The name of the processor, as far as Python knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


@click.command()
@click.option("--model", "-m", metavar="NAME|FOLDER", help="[default: the embedded model]")
@click.option("--title", help="What to call the model.  [default: its name or folder]")
@click.option("--dtype", default="auto", show_default=True)
@click.option("--text", "texts", multiple=True, type=READABLE, help="A text to choose sinks and windows on.")
@click.option("--held-out", multiple=True, type=READABLE, help="A text on which nothing is chosen.")
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "report")
@click.option(
    "--part", "parts", multiple=True, type=click.Choice(PARTS), help="Make this part only; may be repeated."
)
@click.option("--sinks", type=click.IntRange(0), default=4, show_default=True)
@click.option("--span", type=click.IntRange(16), help="Sinks + window.  [default: the trained length]")
@click.option(
    "--spans", type=NumbersParamType(8), help="Sinks + window that are compared.  [default: from span / 16 to 4 span]"
)  # fmt: skip
@click.option("--long", "long_tokens", type=click.IntRange(0), default=1_000_000, show_default=True,
              help="Tokens of the stream that reads; 0: no such part.")  # fmt: skip
@click.option("--write", "write_tokens", type=click.IntRange(0), default=0, show_default=True,
              help="Tokens of the streams that write; 0: no such part.")  # fmt: skip
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Streams that write.")
@click.option("--writer", "writers", multiple=True, type=click.Choice(tuple(WRITERS)),
              help="Settings of the streams that write; may be repeated.  [default: all]")  # fmt: skip
@click.option("--compile", "backend", type=click.Choice(("off", "flat", "inductor")), default="off",
              show_default=True, help="Compile the model for the streams that write.")  # fmt: skip
@click.option("--note", type=READABLE, help="A Markdown file that is copied to the top of the report.")
@click.option(
    "--tokens", type=click.IntRange(2), help="Read at most this many held-out tokens.  [default: all]"
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
    title: str | None,
    dtype: str,
    texts: tuple[Path, ...],
    held_out: tuple[Path, ...],
    out: Path,
    parts: tuple[str, ...],
    sinks: int,
    span: int | None,
    spans: tuple[int, ...] | None,
    long_tokens: int,
    write_tokens: int,
    seeds: int,
    writers: tuple[str, ...],
    backend: str,
    note: Path | None,
    tokens: int | None,
    threads: int,
    scale: float,
) -> None:
    """Make every table and picture of the README."""
    from streamllm.loading import open_source

    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    loaded, tokenizer = streamllm.load(model, device="cpu", dtype=dtype)
    trained = geometry_of(loaded).trained_length
    whole = as_stream(tokenizer, read_texts(held_out) or held_out_texts())
    stream = whole[:tokens]
    choosing = as_stream(tokenizer, read_texts(texts)) if texts else stream
    library = f"the standard library of Python {platform.python_version()}"
    span = span or min(1024, trained or 1024)
    spans = spans or (span // 16, span // 8, span // 4, span // 2, span, 2 * span, 4 * span)
    name = title or model or "The embedded checkpoint"
    subject = Subject(
        loaded, tokenizer, stream, choosing, span, spans, sinks, scale, name,
        text=titles(held_out) or library, choosing_text=titles(texts[:1]) or titles(held_out) or library,
        wording="lines" if texts or held_out else "code",
    )  # fmt: skip
    weights = next(loaded.parameters())
    report = Report(
        out, fingerprint(name, weights, whole, as_stream(tokenizer, read_texts(texts)), span, sinks)
    )
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    head = (
        f"{name}: {parameters:,} parameters, {weights.dtype}, trained for {trained or 'any number of'} tokens. "
        f"Held out: {subject.text}, on which nothing is chosen. torch {torch.__version__}, {processor()}, {threads} "
        f"thread(s). Made by tools/report.py."
    )
    if note is not None:
        head = f"{note.read_text(encoding='utf-8').strip()}\n\n{head}"
    click.echo(head + "\n")

    def read_forever() -> None:
        both = as_stream(tokenizer, [*held_out_texts(), *training_texts()])
        text = torch.cat((stream, choosing)) if texts or held_out else both
        reading(
            report,
            subject,
            text,
            subject.text if not texts or long_tokens <= len(stream) else f"{subject.text}, {titles(texts)}",
            long_tokens,
        )

    makers: dict[str, Callable[[], object]] = {
        "reading": read_forever,  # first, before anything else has used memory
        "speed": lambda: speed(report, subject, open_source(model).file("config.json").parent),
        "modes": lambda: modes(report, subject),
        "budgets": lambda: budgets(report, subject),
        "against": lambda: against_recomputation(report, subject),
        "ablations": lambda: ablations(report, subject),
        "attention": lambda: where_attention_goes(report, subject),
        "recall": lambda: recall_by_distance(report, subject),
        "ruler": lambda: ruler_by_distance(report, subject),
        "writing": lambda: writing(report, subject, write_tokens, seeds, writers or tuple(WRITERS), backend),
    }
    # The embedded checkpoint knows code only: it answers none of RULER's questions.
    wanted = {"reading": long_tokens, "writing": write_tokens, "ruler": subject.wording == "lines"}
    unwanted = {part for part, is_wanted in wanted.items() if not is_wanted}
    for part in parts or PARTS:
        if part not in unwanted:
            report.section(part, makers[part])
    report.write(head, PARTS)


if __name__ == "__main__":
    main()
