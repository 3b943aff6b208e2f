"""`streamllm recall`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from streamllm.commands.evaluation import progress_bar, write_json
from streamllm.commands.loading import ModelChoice
from streamllm.commands.memory import check_cache_fits
from streamllm.commands.options import (
    chunk_option,
    model_options,
    output_options,
    seed_option,
    sinks_option,
    window_option,
)
from streamllm.commands.types import NumbersParamType

WORDINGS = ("lines", "code")  # streamllm.evaluate.WORDINGS, which imports torch


@click.command()
@model_options
@click.option(
    "--mode", type=click.Choice(["sinks", "window", "dense"]), default="sinks", show_default=True,
    help="What the stream keeps: sinks and a window, a window, or everything.",
)  # fmt: skip
@sinks_option
@window_option
@click.option("--back", type=NumbersParamType(1), help="StreamEval: lines back.  [default: ¼ to 2 windows]")
@click.option(
    "--lines", type=click.IntRange(2, 1600), default=500, show_default=True, help="StreamEval: facts stated."
)
@click.option(
    "--every", type=click.IntRange(1, 1600), default=10, show_default=True,
    help="StreamEval: lines between questions.",
)  # fmt: skip
@click.option(
    "--distances", type=NumbersParamType(1), help="Passkey: tokens back.  [default: ¼ to 2 windows]"
)
@click.option(
    "--samples", "count", type=click.IntRange(1, 2**20), default=20, show_default=True,
    help="Passkey: texts for each distance.",
)  # fmt: skip
@click.option(
    "--digits", type=click.IntRange(1, 18), default=5, show_default=True, help="Digits of an answer."
)
@click.option(
    "--wording",
    type=click.Choice(WORDINGS),
    help="State facts in sentences or in Python code.  [default: code for the embedded model, else lines]",
)
@chunk_option(256)
@seed_option
@output_options
def recall(
    chosen: ModelChoice, mode: str, sinks: int, window: int | None, back: tuple[int, ...] | None, lines: int,
    every: int, distances: tuple[int, ...] | None, count: int, digits: int, wording: str | None, chunk: int, seed: int,
    json_file: Path | None, plot: Path | None,
) -> None:  # fmt: skip
    """Show which facts a stream recalls, by distance.

    StreamEval states facts, one per line, and every 10 lines asks for the fact some lines back (20 in the
    paper). The passkey test hides one fact in filler. A fact that has left the window cannot be recalled: sinks
    keep a stream fluent, they do not make its memory longer.
    """
    from streamllm.evaluate import passkey, plots, stream_eval
    from streamllm.evaluate.predictions import new_cache
    from streamllm.evaluate.tables import recall_table

    plots.check_path(plot)
    loaded, tokenizer = chosen.load()
    check_cache_fits(loaded, sinks, window)
    wording = wording or ("code" if chosen.name is None else "lines")
    window = new_cache(loaded, mode, 0 if mode == "window" else sinks, window, chunk).window
    given: dict[str, Any] = {
        "wording": wording, "digits": digits, "seed": seed, "mode": mode, "sinks": sinks, "window": window,
        "chunk": chunk,
    }  # fmt: skip
    with progress_bar("StreamEval") as bar:
        asked = stream_eval(
            loaded, tokenizer, back=back, lines=lines, every=every, progress=lambda *_: bar.update(1), **given
        )
    with progress_bar("passkey") as bar:
        hidden = passkey(
            loaded, tokenizer, distances=distances, samples=count, progress=lambda *_: bar.update(1), **given
        )
    cache = {"dense": "dense", "window": f"window {window}", "sinks": f"{sinks} sinks + window {window}"}[
        mode
    ]
    click.echo(f"StreamEval, {lines} lines, a question every {every}, {cache}\n")
    click.echo(recall_table(asked))
    click.echo(f"\nPasskey, {count} texts for each distance, {cache}\n")
    click.echo(recall_table(hidden))
    if mode != "dense":
        click.echo(
            f"\nA fact more than {window} tokens back has left the window; no number of sinks brings it back."
        )
    curves = {"StreamEval": asked, "passkey": hidden}
    scores = {name: [asdict(score) for score in curve] for name, curve in curves.items()}
    write_json(json_file, scores | given, chosen)
    if plot is not None:
        figure = plots.recall_curves(curves, window=None if mode == "dense" else window)
        plots.save_figure(figure, plot)
