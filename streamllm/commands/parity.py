"""`streamllm parity`."""

from __future__ import annotations

from typing import IO, Any

import click

from streamllm.commands.options import allow_pickle_option, checkpoint_argument, revision_option
from streamllm.commands.types import CountParamType, DeviceParamType

DTYPES = ("float32", "bfloat16", "float16")  # streamllm.parity.DTYPES, which imports torch


@click.command()
@checkpoint_argument
@revision_option
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Type compared in."
)
@click.option(
    "--tokens",
    type=CountParamType(2),
    default=600,
    show_default=True,
    help="How many tokens to compare.",
)
@click.option(
    "--text", type=click.File("r", encoding="utf-8"), help="A text to compare on.  [default: built in]"
)
@click.option("--streaming", is_flag=True, help="Also compare past eviction with the definition, in float64.")
@click.option(
    "--device", type=DeviceParamType(), default="cpu", show_default=True,
    help="Where both libraries compute.",
)  # fmt: skip
@allow_pickle_option
@click.pass_context
def parity(
    ctx: click.Context, name: str | None, revision: str | None, dtype: str, tokens: int, text: IO[str] | None,
    streaming: bool, device: str, allow_pickle: bool,
) -> None:  # fmt: skip
    """Compare a checkpoint with transformers, layer by layer.

    Run this before you trust this library with your own checkpoint, a hub name or a folder. Prints the
    differences of the logits and, where they are too large, the first layer that differs. Exit code 0: the
    same; 1: not the same; 2: the comparison was not possible. Needs transformers: pip install
    'streamllm[parity]'.
    """
    from streamllm.loading import usable_device
    from streamllm.parity import compare, compare_streaming

    try:
        usable_device(device)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--device'") from None
    try:
        given = None if text is None else text.read()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{getattr(text, 'name', 'the text')} is not UTF-8: {error}") from None

    def say(step: str) -> None:
        click.echo(f"… {step}", err=True)

    both: dict[str, Any] = {
        "revision": revision, "text": given, "device": device,
        "allow_pickle": allow_pickle, "say": say,
    }  # fmt: skip
    try:
        report = compare(name, dtype=dtype, tokens=tokens, **both)
    except ImportError as error:
        raise click.UsageError(str(error)) from error
    click.echo(str(report))
    passed = report.passed
    if streaming and not report.refused:
        streamed = compare_streaming(name, **both)
        click.echo(f"\n{streamed}")
        passed = passed and streamed.passed
    verdict = "NOT the same: please report it"
    if passed:
        verdict = "the same: you can trust this checkpoint here"
    elif report.refused and report.difference is None:
        verdict = "refused: this library does not support what transformers ignores in this config"
    click.echo(f"\n{verdict}")
    ctx.exit(0 if passed else 1)
