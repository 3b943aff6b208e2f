"""The command line: `streamllm`, or `python -m streamllm`."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from typing import IO, Any

import click

from streamllm.compiled import BACKENDS

# name -> (module, attribute, what `streamllm --help` says); imported when called, so that help comes at once
COMMANDS = {
    "generate": ("streamllm.cli", "generate", "Let a model talk, as long as you like."),
    "models": ("streamllm.info", "models", "The families of models, and names on the hub."),
    "info": ("streamllm.info", "info", "What a checkpoint is, before its weights are read."),
    "parity": ("streamllm.parity", "parity", "Compare a checkpoint with transformers, layer by layer."),
    "perplexity": (
        "streamllm.evaluate.commands",
        "perplexity",
        "Score a long text: dense, window, sinks, re-computed.",
    ),
    "inspect": (
        "streamllm.evaluate.commands",
        "inspect",
        "Show the attention sinks, and how many are needed.",
    ),
    "recall": ("streamllm.evaluate.commands", "recall", "Show what is remembered, by distance."),
    "convert": ("streamllm.convert", "convert_command", "Write a checkpoint as safetensors."),
}


SMALL = 20_000_000  # parameters below which threads wait for each other longer than they work


class Commands(click.Group):
    """The commands of the table above, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader went away: `streamllm generate | head`
            for stream in (sys.stdout, sys.stderr):  # what they hold is written at exit: to nowhere
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            ctx.exit(141)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="streamllm")
def cli() -> None:
    """Language models that talk for ever in constant memory.

    A model is a Hugging Face name ("EleutherAI/pythia-160m") or a folder with config.json and safetensors;
    without one, a small model that comes with the package is used.
    """


class Forever(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A number of tokens, or "forever"."""

    name = "N|forever"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "forever":
            return "forever"
        try:
            number = int(value)
        except ValueError:
            number = -1
        if number < 0:
            self.fail(f"{value!r} is neither a number of tokens nor 'forever'", param, ctx)
        return number


class Device(click.ParamType):  # type: ignore[type-arg]
    """A device that can be used here."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        import torch

        try:
            torch.zeros(1, device=value).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            self.fail(f"{value!r} cannot be used here: {reason}", param, ctx)
        return str(value)


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "--file",
    "-f",
    type=click.File("r", encoding="utf-8"),
    help="Read the prompt from a file; - is standard input.",
)
@click.option(
    "--model", "-m", metavar="NAME|FOLDER", help="Hub name or folder.  [default: the embedded model]"
)
@click.option("--revision", help="Branch, tag, commit or refs/pr/N of a hub repository.")
@click.option(
    "--sinks", type=click.IntRange(0), default=4, show_default=True, help="First tokens that stay for ever."
)
@click.option(
    "--window",
    type=click.IntRange(1),
    help="Recent tokens that stay.  [default: 1020, or what the model was trained for]",
)
@click.option("--quantize-cache", type=click.Choice(["int8"]), help="Store recent keys and values in 8 bits.")
@click.option("--quantize", type=click.Choice(["int8"]), help="Round the weights to 8 bits.")
@click.option(
    "--compile",
    "backend",
    type=click.Choice(BACKENDS),
    help="Compile the next token's work once the window is full; inductor is the fastest: half a minute, once.",
)
@click.option(
    "--chunk",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Tokens of the prompt read at once.",
)
@click.option(
    "--max-new-tokens",
    "-n",
    type=Forever(),
    metavar="N|forever",
    default="200",
    show_default=True,
    help="When to stop.",
)
@click.option(
    "--temperature", "-t", type=click.FloatRange(0), help="0 is greedy.  [default: the checkpoint's]"
)
@click.option("--top-k", type=click.IntRange(0), help="Sample from the k likeliest tokens.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    help="… from the likeliest tokens of this probability.",
)
@click.option(
    "--min-p", type=click.FloatRange(0, 1), help="… from tokens at least this likely, beside the likeliest."
)
@click.option(
    "--repetition-penalty", type=click.FloatRange(0, min_open=True), help="Above 1: say less again."
)
@click.option("--seed", type=int, help="The same seed, the same text.")
@click.option("--stop", multiple=True, help="Stop before this text; may be given several times.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the model says that it has ended.")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="float32, bfloat16, float16, float64; auto is the checkpoint's.",
)
@click.option("--device", type=Device(), help="cpu, cuda, mps.  [default: the best there is]")
@click.option(
    "--threads", type=click.IntRange(1), help="CPU threads.  [default: 1 for small models, else all cores]"
)
@click.option("--quiet", "-q", is_flag=True, help="No status line.")
def generate(
    prompt: str | None, file: IO[str] | None, model: str | None, revision: str | None, sinks: int,
    window: int | None, quantize_cache: str | None, quantize: str | None, backend: str | None, chunk: int,
    max_new_tokens: int | str, temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None,
    repetition_penalty: float | None, seed: int | None, stop: tuple[str, ...], ignore_eos: bool, dtype: str,
    device: str | None, threads: int | None, quiet: bool,
) -> None:  # fmt: skip
    """Let a model talk, as long as you like.

    The text goes to standard output as it comes, after PROMPT. Without a prompt it is read from --file, or
    from standard input when that is no terminal. Ctrl-C stops.
    """
    import torch

    from streamllm import Stream, compile, load
    from streamllm.status import Status

    if prompt is not None and file is not None:
        raise click.UsageError("give a prompt or a --file, not both")
    if prompt is None:
        source = file or (None if sys.stdin is None or sys.stdin.isatty() else sys.stdin)
        try:
            prompt = source.read() if source else ""
        except UnicodeDecodeError as error:
            raise ValueError(f"the prompt is not UTF-8: {error}") from None
    loaded, tokenizer = load(model, revision=revision, dtype=dtype, device=device, quantize=quantize)
    if threads is None and sum(parameter.numel() for parameter in loaded.parameters()) < SMALL:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)
    if backend is not None:
        loaded = compile(loaded, backend)
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
        eos=[] if ignore_eos else None,
        seed=seed,
    )
    out = sys.stdout
    with Status(stream, sys.stderr, out, quiet) as status:
        out.write(prompt)
        out.flush()
        for piece in pieces:
            out.write(piece)
            out.flush()
            status.tick()
        out.write("\n")
        out.flush()


def main(args: list[str] | None = None) -> None:
    """Run the command line. What a user can get wrong ends in one sentence and exit code 2."""
    from streamllm.compiled import CompileError
    from streamllm.weights.errors import CheckpointError

    for stream in (sys.stdout, sys.stderr):  # text of a model may hold any character, a terminal may not
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    warnings.showwarning = _show_warning
    try:
        code = cli.main(args, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except (CheckpointError, CompileError, ValueError, OSError) as error:
        click.echo(f"Error: {' '.join(str(error).split())}", err=True)
        code = 2
        with contextlib.suppress(OSError, ValueError):  # what a full disk did not take is not tried again
            sys.stdout.flush()
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        click.echo(
            "Error: there is not enough memory: give a smaller --window or --chunk, --dtype bfloat16, "
            "or take a smaller model",
            err=True,
        )
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


def _out_of_memory(error: Exception) -> bool:
    words = str(error).lower()  # the CPU's allocator has no type of its own
    return isinstance(error, MemoryError) or "out of memory" in words or "allocate memory" in words


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    click.echo(f"Warning: {message}", err=True)
