"""`streamllm generate`."""

from __future__ import annotations

import itertools
import sys
from contextlib import nullcontext
from typing import IO

import click

from streamllm.commands.job import join_quietly
from streamllm.commands.loading import ModelChoice
from streamllm.commands.options import (
    chunk_option,
    compile_option,
    compiled,
    dry_option,
    max_new_tokens_option,
    model_options,
    quantize_cache_option,
    repetition_penalty_option,
    sampling_seed_option,
    sinks_option,
    temperature_option,
    tensor_parallel_option,
    top_p_option,
    window_option,
)
from streamllm.commands.types import CountParamType, NumberParamType


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "--file", "-f", type=click.File("r", encoding="utf-8"),
    help="Read the prompt from a file; - is standard input.",
)  # fmt: skip
@model_options
@sinks_option
@window_option
@quantize_cache_option
@compile_option
@chunk_option(None)
@max_new_tokens_option(200, "The longest text, in tokens.")
@temperature_option
@click.option(
    "--top-k", type=CountParamType(0, 2**31 - 1), help="Sample from the k most likely tokens; 0: from all."
)
@top_p_option
@click.option(
    "--min-p", type=NumberParamType(0, 1),
    help="Sample from tokens with at least this share of the highest probability.",
)  # fmt: skip
@repetition_penalty_option
@dry_option
@sampling_seed_option
@click.option("--stop", multiple=True, help="Stop before this text; may be given several times.")
@click.option("--ignore-eos", is_flag=True, help="Continue after the model's end-of-text token.")
@click.option("--tokenizer-eos", is_flag=True, help="End at the tokenizer's end-of-text token, too.")
@tensor_parallel_option
@click.option("--no-echo", is_flag=True, help="Print the generated text without the prompt.")
@click.option("--quiet", "-q", is_flag=True, help="Show no status line.")
def generate(
    prompt: str | None, file: IO[str] | None, chosen: ModelChoice, sinks: int, window: int | None,
    quantize_cache: str | None, backend: str, chunk: int | None, max_new_tokens: int | str,
    temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None,
    repetition_penalty: float | None, dry: float | None, seed: int | None, stop: tuple[str, ...], ignore_eos: bool,
    tokenizer_eos: bool, tensor_parallel: bool, no_echo: bool, quiet: bool,
) -> None:  # fmt: skip
    """Generate text after a prompt, for as long as you like.

    The prompt and the generated text go to standard output. Without PROMPT, the prompt is read from --file,
    or from standard input where that is not a terminal. Ctrl-C stops. With --tensor-parallel, one process reads
    the prompt and prints.
    """
    if prompt is not None and file is not None:
        raise click.UsageError("give a prompt or a --file, not both")
    if ignore_eos and tokenizer_eos:
        raise click.UsageError("give --ignore-eos or --tokenizer-eos, not both")
    if "" in stop:
        raise click.UsageError("a stop string must not be empty")
    job = join_quietly(chosen.device) if tensor_parallel else None
    if prompt is None:
        prompt = job.from_first(lambda: _read_prompt(file)) if job else _read_prompt(file)

    from streamllm import Stream
    from streamllm.status import Status

    with job.all_or_none() if job else nullcontext():
        loaded, tokenizer = chosen.load(tensor_parallel)
        eos = [] if ignore_eos else tokenizer.eos_token_ids(loaded) if tokenizer_eos else None
        loaded = compiled(loaded, backend)
        stream = Stream(loaded, tokenizer, sinks=sinks, window=window, chunk=chunk, quantize=quantize_cache)
        pieces = stream.generate(
            prompt,
            max_new_tokens=None if max_new_tokens == "forever" else int(max_new_tokens),
            stop=stop,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            dry_multiplier=dry,
            eos=eos,
            seed=seed,
        )
    out = sys.stdout
    with Status(stream, sys.stderr, out, quiet) as status:
        if not no_echo:
            out.write(prompt)
            out.flush()
        with status.reading(lambda: len(tokenizer.encode_piece(prompt))):
            first = next(pieces, "")
        for piece in itertools.chain((first,), pieces):
            out.write(piece)
            out.flush()
            status.tick()
        out.write("\n")
        out.flush()


def _read_prompt(file: IO[str] | None) -> str:
    """The text of `file`, or of standard input where that is not a terminal; else nothing."""
    source = file or (None if sys.stdin is None or sys.stdin.isatty() else sys.stdin)
    try:
        return source.read() if source else ""
    except UnicodeDecodeError as error:
        name = getattr(file, "name", None) or "standard input"
        raise ValueError(f"the prompt is not UTF-8: {error}; it comes from {name}") from None
