"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from streamllm.commands.loading import ModelChoice
from streamllm.commands.types import (
    MAX_THREADS,
    CountParamType,
    DeviceParamType,
    DtypeParamType,
    ForeverParamType,
    NumberParamType,
    OutputFileParamType,
    SeedParamType,
    TemperatureParamType,
)

if TYPE_CHECKING:
    from torch import nn

Command = TypeVar("Command", bound=Callable[..., Any])

WEIGHT_FORMATS = ("int8", "int4")  # those of streamllm.models.quantized; importing it would import torch
CACHE_FORMATS = ("int8",)
OUTPUT_FILE = OutputFileParamType()


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
    "--dtype", type=DtypeParamType(), default="auto", show_default=True,
    help="float32, bfloat16, float16 or float64; auto takes the checkpoint's.",
)  # fmt: skip
device_option = click.option(
    "--device", type=DeviceParamType(), help="cpu, cuda, mps.  [default: the best available]"
)
quantize_option = click.option(
    "--quantize", type=click.Choice(WEIGHT_FORMATS), help="Round the weights to 8 or 4 bits."
)
tensor_parallel_option = click.option(
    "--tensor-parallel", is_flag=True,
    help="Divide the model among the processes that torchrun has started: "
    "torchrun --nproc-per-node 2 -m streamllm … --tensor-parallel.",
)  # fmt: skip
threads_option = click.option(
    "--threads", type=CountParamType(1, MAX_THREADS),
    help="CPU threads. On a busy machine, 1 is often the fastest.  [default: 1 for small models, else all cores]",
)  # fmt: skip


def model_options(command: Command) -> Command:
    """The options that choose a model and how it computes. The command gets them as `chosen`, a ModelChoice."""

    @functools.wraps(command)
    def with_choice(**arguments: Any) -> Any:
        chosen = ModelChoice(
            name=arguments.pop("model"),
            **{name: arguments.pop(name) for name in ("revision", "dtype", "device", "threads", "quantize")},
            allow_pickle=arguments.pop("allow_pickle"),
        )
        return command(chosen=chosen, **arguments)

    wrapped: Any = with_choice
    for option in (
        allow_pickle_option, quantize_option, threads_option, device_option, dtype_option, revision_option,
        model_option,
    ):  # fmt: skip
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


# The stream

sinks_option = click.option(
    "--sinks", type=CountParamType(0), default=4, show_default=True,
    help="First tokens that are kept.",
)  # fmt: skip
WINDOW_HELP = "Recent tokens that are kept.  [default: 4092, or less where the model was trained for less]"
window_option = click.option("--window", type=CountParamType(1), help=WINDOW_HELP)
quantize_cache_option = click.option(
    "--quantize-cache", type=click.Choice(CACHE_FORMATS), help="Store recent keys and values in 8 bits."
)


# Those of streamllm.compiled; importing it would import torch.
COMPILE_BACKENDS = ("auto", "flat", "inductor", "cudagraphs")
compile_option = click.option(
    "--compile", "backend", type=click.Choice((*COMPILE_BACKENDS, "off")), default="auto", show_default=True,
    help="How the next token is computed. inductor is the fastest on a CPU, and compiles for half a minute the first "
    "time. auto begins at once and takes inductor's code when it is ready; flat gives the same text on each run.",
)  # fmt: skip


def compiled(model: nn.Module, backend: str) -> nn.Module:
    """The model, compiled as `--compile` says."""
    from streamllm import compile

    return model if backend == "off" else compile(model, backend)


def chunk_option(default: int | None) -> Callable[[Command], Command]:
    """--chunk, with the default of one command. None: the cache's."""
    text = "Tokens read at once: more are faster and take more memory."
    text += "" if default else "  [default: 512; on CUDA 2048]"
    return click.option("--chunk", type=CountParamType(1), default=default, show_default=True, help=text)


# Which token comes next

temperature_option = click.option(
    "--temperature", "-t", type=TemperatureParamType(), help="0 is greedy.  [default: the checkpoint's]"
)
top_p_option = click.option(
    "--top-p", type=NumberParamType(0, 1, min_open=True),
    help="Sample from the most likely tokens that together have this probability.",
)  # fmt: skip
repetition_penalty_option = click.option(
    "--repetition-penalty", type=NumberParamType(0, min_open=True),
    help="Above 1, tokens that were seen become less likely.",
)  # fmt: skip
dry_option = click.option(
    "--dry", type=NumberParamType(0),
    help="Above 0, a token that continues a repeated phrase becomes less likely (DRY); 0.8 is usual.",
)  # fmt: skip
sampling_seed_option = click.option("--seed", type=SeedParamType(), help="The same seed gives the same text.")


def max_new_tokens_option(default: int, help: str) -> Callable[[Command], Command]:
    """--max-new-tokens, with the default of one command."""
    return click.option(
        "--max-new-tokens", "-n", type=ForeverParamType(), metavar="N|forever", default=str(default),
        show_default=True, help=help,
    )  # fmt: skip


# For the commands that evaluate a model

texts_argument = click.argument(
    "files", nargs=-1, metavar="[TEXT_FILE]…", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
seed_option = click.option(
    "--seed",
    type=SeedParamType(),
    default=0,
    show_default=True,
    help="The same seed makes the same random choices.",
)


def output_options(command: Command) -> Command:
    """--json and --plot."""
    plot_option = click.option("--plot", type=OUTPUT_FILE, help="Draw a picture: .png, .svg or .pdf.")
    json_option = click.option("--json", "json_file", type=OUTPUT_FILE, help="Write the numbers.")
    return json_option(plot_option(command))
