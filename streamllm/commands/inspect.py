"""`streamllm inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from streamllm.commands.evaluation import (
    check_memory,
    picture_title,
    progress_bar,
    read_texts,
    show_scores,
    write_json,
)
from streamllm.commands.loading import ModelChoice
from streamllm.commands.options import (
    chunk_option,
    model_options,
    output_options,
    seed_option,
    texts_argument,
)
from streamllm.commands.types import CountParamType, NumbersParamType


@click.command()
@texts_argument
@model_options
@click.option(
    "--samples", "count", type=CountParamType(1, 2**20), default=32, show_default=True,
    help="How many random parts of the text the attention is read on.",
)  # fmt: skip
@click.option(
    "--length", type=CountParamType(16, 2**20), default=64, show_default=True, help="Tokens of each part."
)
@click.option(
    "--sinks", type=NumbersParamType(0), default="0,1,2,4,8", show_default=True,
    help="Numbers of sinks to try.",
)  # fmt: skip
@click.option(
    "--span", type=CountParamType(2),
    help="Sinks + window.  [default: what the model was trained for, at most 1024]",
)  # fmt: skip
@click.option(
    "--tokens", type=CountParamType(2), default=50_000, show_default=True,
    help="How many tokens are read for each number of sinks.",
)  # fmt: skip
@chunk_option(256)
@seed_option
@output_options
def inspect(
    files: tuple[Path, ...], chosen: ModelChoice, count: int, length: int, sinks: tuple[int, ...],
    span: int | None, tokens: int, chunk: int, seed: int, json_file: Path | None, plot: Path | None,
) -> None:  # fmt: skip
    """Show the attention sinks, and how many a model needs.

    The table shows the share of attention that later tokens pay to each of the first eight, by layer (the mean
    of the heads); --plot draws every head. Then the text is streamed with each number of sinks, beside a window
    that fills the same cache. The smallest number within 1 % of the best is recommended.
    """
    from streamllm.evaluate import attention, plots, recommend
    from streamllm.evaluate.inspect import check_sweep
    from streamllm.evaluate.tables import attention_table, sinks_table
    from streamllm.evaluate.texts import samples

    plots.check_path(plot)
    loaded, tokenizer = chosen.load()
    check_sweep(loaded, tokens, sinks, span)
    stream = read_texts(tokenizer, files)[0]
    span = check_sweep(loaded, len(stream[:tokens]), sinks, span)
    check_memory(loaded, 0, span)
    with progress_bar("attention", count) as bar:
        seen = attention(
            loaded, samples(tokenizer, stream, count, length, seed), progress=lambda done, _: bar.update(1)
        )
    share = seen.first(8)  # [L, H, 8]
    click.echo(f"Share of attention on the first tokens, {count} texts of {length} tokens, in %\n")
    click.echo(attention_table(share))
    with progress_bar("sinks", len(set(sinks)) * (min(tokens, len(stream)) - 1)) as bar:
        found = recommend(
            loaded,
            stream[:tokens],
            sinks=sorted(set(sinks)),
            span=span,
            chunk=chunk,
            progress=show_scores(bar),
        )
    click.echo(f"\nPerplexity beyond twice the cache, sinks + window = {found.span}\n")
    click.echo(sinks_table(found))
    write_json(
        json_file,
        {
            "share": share.tolist(),
            "recommended_sinks": found.sinks,
            "span": found.span,
            "sweep": [result.to_dict() for result in found.sweep],
        },
        chosen,
    )
    if plot is not None:
        title = picture_title(chosen, f"{count} samples of {length} tokens", files)
        plots.save_figure(plots.attention_map(seen, title=title), plot)
