"""The command line: `streamllm`, or `python -m streamllm`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any

import click

import streamllm
from streamllm.commands.batch import batch
from streamllm.commands.chat import chat
from streamllm.commands.convert import convert
from streamllm.commands.generate import generate
from streamllm.commands.info import info
from streamllm.commands.inspect import inspect
from streamllm.commands.models import models
from streamllm.commands.parity import parity
from streamllm.commands.perplexity import perplexity
from streamllm.commands.recall import recall

# In the order of `streamllm --help`, which shows the first sentence of each docstring.
COMMANDS = {
    "generate": generate,
    "chat": chat,
    "batch": batch,
    "models": models,
    "info": info,
    "parity": parity,
    "perplexity": perplexity,
    "inspect": inspect,
    "recall": recall,
    "convert": convert,
}

TERMINATED = 143  # exit code after SIGTERM, as shells have it
USER_ERROR = 2  # exit code where the command line, a file or a checkpoint is wrong
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
BROKEN_PIPE = 141  # exit code where the reader of standard output went away, as shells have it


class _CommandGroup(click.Group):
    """The commands in the order of the table, and a quiet end for `streamllm generate | head`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # Python flushes both streams at exit, which would fail again: send the rest to nowhere.
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            ctx.exit(BROKEN_PIPE)


@click.group(cls=_CommandGroup, commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="streamllm")
def cli() -> None:
    """Language models that generate forever in constant memory.

    A model is a Hugging Face name ("EleutherAI/pythia-160m") or a folder with config.json and safetensors.
    Without one, a small model that comes with the package is used.
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line. An error that a user can cause is printed as one sentence; the exit code is 2."""
    if sys.stderr is None:  # closed by `2>&-`
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:  # closed by `>&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        click.echo("Error: standard output is closed: give it a file, or /dev/null", err=True)
        sys.exit(USER_ERROR)
    for stream in (sys.stdout, sys.stderr):  # generated text may hold characters that a terminal lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    warnings.showwarning = _show_warning
    with _signals() as received:
        try:
            code = cli.main(args, standalone_mode=False)
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except (click.Abort, KeyboardInterrupt):
            code = INTERRUPTED
        except _Terminated:
            code = TERMINATED
        except Exception as error:
            sentence = _user_error(error)
            if received:  # an import that is interrupted may raise anything
                code = received[-1]
            elif sentence is None:
                raise
            else:
                if not _is_reported_elsewhere(error):
                    click.echo(f"Error: {sentence}", err=True)
                code = USER_ERROR
                with contextlib.suppress(OSError, ValueError):  # a full disk: do not fail once more at exit
                    sys.stdout.flush()
    sys.exit(code if isinstance(code, int) else 0)


class _Terminated(BaseException):
    """SIGTERM, which ends a command as Ctrl-C does: the terminal is left as it was, and children end."""


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Turns SIGINT and SIGTERM into exceptions. The value lists the exit codes of those that came.

    While a module is imported they end the process at once: torch's import may swallow an exception and go on.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(INTERRUPTED)
        if _imports(frame):
            os._exit(INTERRUPTED)
        raise KeyboardInterrupt

    def terminate(number: int, frame: FrameType | None) -> None:
        received.append(TERMINATED)
        if _imports(frame):
            os._exit(TERMINATED)
        raise _Terminated

    before: dict[int, Any] = {}
    for number, handler in ((signal.SIGINT, interrupt), (signal.SIGTERM, terminate)):
        with contextlib.suppress(ValueError):  # not in the main thread
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield received
    finally:
        for changed, previous in before.items():
            signal.signal(changed, previous)


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported in this frame or in one that called it."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _user_error(error: Exception) -> str | None:
    """The sentence about an error that a user can cause; None for any other error, which is our fault."""
    sentence = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError)):
        return sentence
    # After the types above, because looking up the errors of this package imports torch.
    if isinstance(error, (streamllm.CheckpointError, streamllm.CompileError)):
        return sentence
    if "streamllm.tensor_parallel" in sys.modules:
        from streamllm.tensor_parallel import JobError

        if isinstance(error, JobError):
            return sentence
    if _out_of_memory(error):
        if isinstance(error, MemoryError) and sentence:  # our own; Python's says nothing
            return sentence
        return (
            "there is not enough memory: give a smaller --window or --chunk, --dtype bfloat16, "
            "or take a smaller model"
        )
    return None


def _is_reported_elsewhere(error: Exception) -> bool:
    """Whether another process of a tensor-parallel job prints the error."""
    if "streamllm.tensor_parallel" not in sys.modules:
        return False
    from streamllm.tensor_parallel import is_reported_elsewhere

    return is_reported_elsewhere(error)


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, RuntimeError):  # torch's CPU allocator raises no type of its own
        message = str(error).lower()
        return "out of memory" in message or "allocate memory" in message
    return isinstance(error, MemoryError)


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    click.echo(f"Warning: {message}", err=True)
