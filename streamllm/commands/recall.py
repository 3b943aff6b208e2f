"""`streamllm recall`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamllm.commands.evaluation import picture_title, progress_bar, write_json
from streamllm.commands.loading import ModelChoice
from streamllm.commands.options import (
    chunk_option,
    model_options,
    output_options,
    seed_option,
    sinks_option,
    window_option,
)
from streamllm.commands.types import ChoicesParamType, CountParamType, NumbersParamType

if TYPE_CHECKING:
    from streamllm.evaluate import Recall

MODES = ("sinks", "window", "dense")
TASKS = ("streameval", "passkey", "needle", "variables", "words")  # the last three: streamllm.evaluate.TASKS
NAMES = {"streameval": "StreamEval"}
WORDINGS = ("lines", "code")  # streamllm.evaluate.WORDINGS, which imports torch


@click.command()
@model_options
@click.option(
    "--mode", "modes", type=ChoicesParamType(MODES), default="sinks", show_default=True,
    help="What the stream keeps: sinks and a window, a window, or everything. Several with commas, or all.",
)  # fmt: skip
@click.option(
    "--task", "tasks", type=ChoicesParamType(TASKS), default="streameval,passkey", show_default=True,
    help="needle, variables and words follow RULER's rules. Several with commas, or all.",
)  # fmt: skip
@sinks_option
@window_option
@click.option("--back", type=NumbersParamType(1), help="StreamEval: lines back.  [default: ¼ to 2 windows]")
@click.option(
    "--lines",
    type=CountParamType(2, 1600),
    default=500,
    show_default=True,
    help="StreamEval: how many facts are stated.",
)
@click.option(
    "--every", type=CountParamType(1, 1600), default=10, show_default=True,
    help="StreamEval: lines between questions.",
)  # fmt: skip
@click.option(
    "--distances", type=NumbersParamType(1), help="All other tasks: tokens back.  [default: ¼ to 2 windows]"
)
@click.option(
    "--samples", "count", type=CountParamType(1, 2**20), default=20, show_default=True,
    help="All other tasks: texts for each distance.",
)  # fmt: skip
@click.option(
    "--digits",
    type=CountParamType(1, 18),
    default=5,
    show_default=True,
    help="StreamEval and passkey: digits of an answer.",
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
    chosen: ModelChoice, modes: tuple[str, ...], tasks: tuple[str, ...], sinks: int, window: int | None,
    back: tuple[int, ...] | None, lines: int, every: int, distances: tuple[int, ...] | None, count: int, digits: int,
    wording: str | None, chunk: int, seed: int, json_file: Path | None, plot: Path | None,
) -> None:  # fmt: skip
    """Show which facts a stream recalls, by distance.

    StreamEval states facts, one per line, and every 10 lines asks for the fact some lines back (20 in the
    paper). The passkey test hides one fact in filler. Three tasks follow RULER's rules: needle, a number in
    filler; variables, a chain of five; words, the most common one of a list. A fact that has left the window
    cannot be recalled: sinks keep a stream fluent, they do not make its memory longer.
    """
    from streamllm.evaluate import passkey, plots, ruler, stream_eval
    from streamllm.evaluate.predictions import new_cache

    plots.check_path(plot)
    loaded, tokenizer = chosen.load()
    wording = wording or ("code" if chosen.name is None else "lines")
    # The same distances in every mode: those of the window, which dense mode does not have.
    window = new_cache(loaded, modes[0], 0 if modes[0] == "window" else sinks, window, chunk).window
    worded: dict[str, Any] = {"wording": wording, "digits": digits}
    curves: dict[str, Sequence[Recall]] = {}
    for mode, task in product(modes, tasks):
        given: dict[str, Any] = {"seed": seed, "mode": mode, "sinks": sinks, "window": window, "chunk": chunk}
        name = NAMES.get(task, task)
        with progress_bar(f"{name} {mode}") as bar:
            given["progress"] = lambda *_, bar=bar: bar.update(1)
            if task == "streameval":
                scores = stream_eval(
                    loaded, tokenizer, back=back, lines=lines, every=every, **worded, **given
                )
                what = f"{lines} lines, a question every {every}"
            else:
                what = f"{count} texts for each distance"
                given |= {"distances": distances, "samples": count}
                if task == "passkey":
                    scores = passkey(loaded, tokenizer, **worded, **given)
                else:
                    scores = ruler(loaded, tokenizer, task, **given)
        kept = {"dense": "dense", "window": f"window {window}", "sinks": f"{sinks} sinks + window {window}"}[
            mode
        ]
        curves[name if len(modes) == 1 else f"{name}, {mode}"] = scores
        show(f"{name[0].upper()}{name[1:]}, {what}, {kept}", scores)
    if set(modes) != {"dense"}:
        click.echo(
            f"A fact more than {window} tokens back has left the window; no number of sinks brings it back."
        )
    numbers = {name: [asdict(score) for score in scores] for name, scores in curves.items()}
    settings = {"seed": seed, "mode": ",".join(modes), "sinks": sinks, "window": window, "chunk": chunk}
    write_json(json_file, numbers | worded | settings, chosen)
    if plot is not None:
        end = None if set(modes) == {"dense"} else window
        title = picture_title(chosen, f"{count} texts for each distance")
        plots.save_figure(plots.recall_curves(curves, window=end, title=title), plot)


def show(title: str, scores: Sequence[Recall]) -> None:
    from streamllm.evaluate.tables import recall_table

    click.echo(f"{title}\n\n{recall_table(scores)}\n")
