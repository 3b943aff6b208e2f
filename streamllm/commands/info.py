"""`streamllm info`."""

from __future__ import annotations

import click

from streamllm.commands.options import (
    checkpoint_argument,
    dtype_option,
    quantize_option,
    revision_option,
    sinks_option,
    window_option,
)
from streamllm.commands.types import CountParamType


@click.command()
@checkpoint_argument
@revision_option
@sinks_option
@window_option
@dtype_option
@quantize_option
@click.option(
    "--tensor-parallel", "processes", type=CountParamType(1), default=1, metavar="N",
    help="Say what each of N processes would hold.",
)  # fmt: skip
def info(
    name: str | None, revision: str | None, sinks: int, window: int | None, dtype: str, quantize: str | None,
    processes: int,
) -> None:  # fmt: skip
    """Describe a checkpoint without reading its weights.

    The checkpoint is a hub name or a folder; weights on the hub are not downloaded. --sinks, --window,
    --dtype and --quantize change the sizes that are printed for the parameters and the cache.
    """
    from streamllm.info import describe
    from streamllm.loading import open_source
    from streamllm.weights.checkpoint import Checkpoint

    checkpoint = Checkpoint(open_source(name, revision=revision))
    lines = list(describe(checkpoint, sinks, window, dtype, processes, quantize))
    click.echo("\n".join(f"{what:<12} {line}" for what, line in lines))
