"""`streamllm perplexity`."""

from __future__ import annotations

from pathlib import Path

import click

from streamllm.commands.evaluation import check_memory, picture_title, read_texts, write_json
from streamllm.commands.loading import ModelChoice
from streamllm.commands.options import (
    OUTPUT_FILE,
    WINDOW_HELP,
    chunk_option,
    model_options,
    output_options,
    quantize_cache_option,
    seed_option,
    texts_argument,
)
from streamllm.commands.resumable import ResumableRuns, combinations, fingerprint
from streamllm.commands.types import ChoicesParamType, CountParamType, NumbersParamType

MODES = ("sinks", "window", "dense", "recompute")  # streamllm.evaluate.MODES, which imports torch


@click.command()
@texts_argument
@model_options
@click.option(
    "--mode", "modes", type=ChoicesParamType(MODES), default="sinks", show_default=True,
    help="sinks, window, dense, recompute; or all.",
)  # fmt: skip
@click.option(
    "--sinks", type=NumbersParamType(0), default="4", show_default=True, help="First tokens that are kept."
)
@click.option("--window", "windows", type=NumbersParamType(1), help=WINDOW_HELP)
@quantize_cache_option
@click.option("--tokens", type=CountParamType(2), help="Read only the first N tokens.  [default: all]")
@click.option("--reset-between-texts", is_flag=True, help="Start every text with an empty cache.")
@chunk_option(256)
@click.option(
    "--dense-tokens", type=CountParamType(2), default=16384, show_default=True,
    help="In dense mode, read only the first N tokens: its memory grows with each.",
)  # fmt: skip
@click.option(
    "--positions", type=CountParamType(0), default=2000, show_default=True,
    help="In recompute mode, score N random predictions; 0: all.",
)  # fmt: skip
@click.option(
    "--batch", type=CountParamType(1, 2**16), default=32, show_default=True,
    help="In recompute mode, compute N predictions at a time.",
)  # fmt: skip
@seed_option
@click.option(
    "--resume", type=OUTPUT_FILE,
    help="Save the run to this file, and continue from the file if it exists.",
)  # fmt: skip
@output_options
def perplexity(
    files: tuple[Path, ...], chosen: ModelChoice, modes: tuple[str, ...], sinks: tuple[int, ...],
    windows: tuple[int, ...] | None, quantize_cache: str | None, tokens: int | None, reset_between_texts: bool,
    chunk: int, dense_tokens: int, positions: int, batch: int, seed: int, resume: Path | None,
    json_file: Path | None, plot: Path | None,
) -> None:  # fmt: skip
    """Measure how well a model predicts a long text.

    \b
    sinks      each token sees the first --sinks tokens and the last --window
    window     the last --window only
    dense      everything before it
    recompute  as sinks, but computed anew for every token: slow, and the best possible quality

    --mode, --sinks and --window take several values with commas between them; every combination is run. The
    window counts the token itself: the paper's 4 + 1020 is --sinks 4 --window 1021. Without a text, the
    held-out modules of Python's standard library are read; the embedded model was not trained on them.

    The columns are perplexities by position: 128 means the predictions at 128 … 255.
    """
    from streamllm.evaluate import plots
    from streamllm.evaluate.tables import perplexity_table
    from streamllm.evaluate.texts import first_tokens
    from streamllm.models.step import geometry_of

    plots.check_path(plot)
    loaded, tokenizer = chosen.load()
    settings = combinations(modes, sinks, windows, quantize_cache)
    for setting in settings:
        check_memory(loaded, setting.sinks, setting.window, setting.quantize)
    texts = read_texts(tokenizer, files, separate=reset_between_texts, limit=tokens)
    runs = ResumableRuns(
        loaded,
        resume,
        fingerprint(chosen.name, chosen.precision, texts, chunk, dense_tokens, positions, seed),
    )
    results = []
    for setting in settings:
        read = first_tokens(texts, dense_tokens) if setting.mode == "dense" else texts
        scored = positions if setting.mode == "recompute" and positions > 0 else None
        results.append(runs.score(setting, read, chunk=chunk, positions=scored, seed=seed, batch=batch))
    runs.finish()
    click.echo(perplexity_table(results))
    write_json(json_file, {"results": [result.to_dict() for result in results]}, chosen)
    if plot is not None:
        trained = geometry_of(loaded).trained_length
        title = picture_title(chosen, f"{sum(map(len, texts)):,} tokens", files)
        plots.save_figure(plots.perplexity_curves(results, trained_length=trained, title=title), plot)
