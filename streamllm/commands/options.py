"""Options that several commands share, and types of option values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

QUANTIZATIONS = ("int8",)
OUTPUT_FILE = click.Path(dir_okay=False, path_type=Path)


class ForeverParamType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
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


class NumbersParamType(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers, none below `minimum`, with commas between them."""

    name = "N,N,…"

    def __init__(self, minimum: int) -> None:
        self.minimum = minimum

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or min(numbers) < self.minimum:
            self.fail(
                f"{value!r} is not a list of numbers of at least {self.minimum}, like 4 or 0,4,8", param, ctx
            )
        return numbers


class DeviceParamType(click.ParamType):  # type: ignore[type-arg]
    """The name of a device. Only torch knows which devices work: see `check_device`."""

    name = "device"


def check_device(device: str | None) -> None:
    """Raise click.BadParameter where torch cannot use the device that --device names."""
    if device is None:
        return
    import torch

    try:
        torch.zeros(1, dtype=torch.float32, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise click.BadParameter(
            f"{device!r} cannot be used here: {reason}",
            ctx=click.get_current_context(silent=True),
            param_hint="'--device'",
        ) from None


# Which checkpoint

checkpoint_argument = click.argument("name", metavar="[NAME|FOLDER]", required=False)
model_option = click.option(
    "--model", "-m", metavar="NAME|FOLDER", help="Hub name or folder.  [default: the embedded model]"
)
revision_option = click.option("--revision", help="Branch, tag, commit or refs/pr/N of a hub repository.")
allow_pickle_option = click.option(
    "--allow-pickle", is_flag=True, help="Read pytorch_model.bin; loading a pickle can run code."
)


# How it computes

dtype_option = click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="float32, bfloat16, float16 or float64; auto takes the checkpoint's.",
)
quantize_option = click.option(
    "--quantize", type=click.Choice(QUANTIZATIONS), help="Round the weights to 8 bits."
)
tensor_parallel_option = click.option(
    "--tensor-parallel", is_flag=True,
    help="Divide the model among the processes that torchrun has started: "
    "torchrun --nproc-per-node 2 -m streamllm generate --tensor-parallel …",
)  # fmt: skip
threads_option = click.option(
    "--threads", type=click.IntRange(1), help="CPU threads.  [default: 1 for small models, else all cores]"
)


# The stream

sinks_option = click.option(
    "--sinks", type=click.IntRange(0), default=4, show_default=True, help="First tokens that are kept."
)
WINDOW_HELP = "Recent tokens that are kept.  [default: 1020, or what the model was trained for]"
window_option = click.option("--window", type=click.IntRange(1), help=WINDOW_HELP)
quantize_cache_option = click.option(
    "--quantize-cache", type=click.Choice(QUANTIZATIONS), help="Store recent keys and values in 8 bits."
)


def chunk_option(default: int | None) -> Callable[[Command], Command]:
    """--chunk, with the default of one command. None: the cache's."""
    text = "Tokens read at once." + ("" if default else "  [default: 512; on CUDA 2048]")
    return click.option("--chunk", type=click.IntRange(1), default=default, show_default=True, help=text)


# Groups of options for the commands that evaluate a model

texts_argument = click.argument(
    "files", nargs=-1, metavar="[TEXT_FILE]…", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
seed_option = click.option("--seed", type=int, default=0, show_default=True)


def model_options(command: Command) -> Command:
    """--model, --revision, --dtype, --device and --threads."""
    device_option = click.option("--device", help="cpu, cuda, mps.  [default: the best available]")
    for option in (threads_option, device_option, dtype_option, revision_option, model_option):
        command = option(command)
    return command


def output_options(command: Command) -> Command:
    """--json and --plot."""
    plot_option = click.option("--plot", type=OUTPUT_FILE, help="Draw a picture: .png, .svg or .pdf.")
    json_option = click.option("--json", "json_file", type=OUTPUT_FILE, help="Write the numbers.")
    return json_option(plot_option(command))
