"""`streamllm chat`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from streamllm.commands.loading import ModelChoice
from streamllm.commands.options import (
    OUTPUT_FILE,
    chunk_option,
    compile_option,
    compiled,
    dry_option,
    max_new_tokens_option,
    model_options,
    quantize_cache_option,
    repetition_penalty_option,
    sampling_seed_option,
    temperature_option,
    top_p_option,
    window_option,
)
from streamllm.commands.types import CountParamType

if TYPE_CHECKING:
    from streamllm.stream import Stream

FILE = click.Path(dir_okay=False, path_type=Path)


class SinksParamType(click.ParamType):  # type: ignore[type-arg]
    """A number of tokens, or "system"."""

    name = "N|system"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "system":
            return "system"
        try:
            number = int(str(value))
        except ValueError:
            number = -1
        if number < 0:
            self.fail(f"{value!r} is neither a number of tokens nor 'system'", param, ctx)
        return number


# The options of a setting that a session keeps.
OPTIONS_OF = {
    "sinks": ("sinks", "start_size", "dense"),
    "window": ("window", "recent_size", "dense"),
    "chunk": ("chunk",),
    "quantize": ("quantize_cache",),
    "evict": ("evict",),
}


def _check_same(stream: Stream, session: Path, given: Mapping[str, object], system: str | None) -> None:
    """Raises click.UsageError where the command line asks for another setting than that of a resumed session."""
    source = click.get_current_context().get_parameter_source
    kept = stream._settings()
    if kept["pins_system"] and given["sinks"] == "system":
        kept["sinks"] = "system"
    for name, wanted in given.items():
        asked = [option for option in OPTIONS_OF[name] if source(option) is ParameterSource.COMMANDLINE]
        if asked and wanted != kept[name]:
            option = "--" + asked[0].replace("_", "-")
            raise click.UsageError(
                f"{session} goes on with {name}={kept[name]}, not {wanted}: leave {option} out, or begin a new session"
            )
    turns = stream.turns
    if system and turns and (turns[0].role, turns[0].text) != ("system", system):
        raise click.UsageError(
            f"{session} goes on with its own system prompt: leave --system out, or type /system in the chat to "
            f"start again"
        )


@click.command()
@model_options
@click.option(
    "--sinks", type=SinksParamType(), default="system", show_default=True,
    help="First tokens that are kept; system: the whole system prompt.",
)  # fmt: skip
@window_option
@click.option("--start-size", type=CountParamType(0), help="The same as --sinks N, in streaming-llm's words.")
@click.option(
    "--recent-size", type=CountParamType(0),
    help="The same as --window N+1: streaming-llm evicts after the forward.",
)  # fmt: skip
@click.option("--dense", is_flag=True, help="Evict nothing until the model's trained length is reached.")
@click.option(
    "--evict", type=click.Choice(("turn", "token")), default="turn", show_default=True,
    help="What leaves a full window: the oldest whole turn, or the oldest token.",
)  # fmt: skip
@quantize_cache_option
@compile_option
@chunk_option(None)
@click.option("--system", help="The system prompt.")
@max_new_tokens_option(1000, "The longest answer, in tokens.")
@temperature_option
@top_p_option
@repetition_penalty_option
@dry_option
@sampling_seed_option
@click.option(
    "--prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Answer the `turns`, or the `prompt`, of each line of a JSON-lines file.",
)  # fmt: skip
@click.option("--session", type=OUTPUT_FILE, help="Save the session to this file after each turn.")
@click.option("--resume", is_flag=True, help="Go on with the session in --session.")
def chat(
    chosen: ModelChoice, sinks: int | str, window: int | None, start_size: int | None,
    recent_size: int | None, dense: bool, evict: str, quantize_cache: str | None, backend: str,
    chunk: int | None, system: str | None, max_new_tokens: int | str, temperature: float | None, top_p: float | None,
    repetition_penalty: float | None, dry: float | None, seed: int | None, prompts: Path | None,
    session: Path | None, resume: bool,
) -> None:  # fmt: skip
    """Chat with a model, for as long as you like.

    Type a message, or /help. Ctrl-C interrupts an answer, Ctrl-D ends. A model without a chat template continues
    the text that you type.
    """
    if resume and session is None:
        raise click.UsageError("--resume needs --session FILE, the file to go on with")
    if dense and (window is not None or recent_size is not None):
        raise click.UsageError("--dense keeps everything: give no --window and no --recent-size")
    if recent_size is not None and window is not None:
        raise click.UsageError("give --window or --recent-size, not both")
    if session is not None and session.exists() and not resume:
        raise click.UsageError(
            f"{session} exists already: give --resume to go on with it, or another file for a new session"
        )
    if prompts is not None and resume:
        raise click.UsageError("--prompts begins a new session: give it without --resume")

    from streamllm import Stream
    from streamllm.models.step import geometry_of
    from streamllm.session.terminal import Chat, answer_prompts

    loaded, tokenizer = chosen.load()
    sinks = sinks if start_size is None else start_size
    window = window if recent_size is None else recent_size + 1
    if dense:
        trained = geometry_of(loaded).trained_length
        if trained is None:
            raise ValueError(
                "the model has no trained length, so --dense has no limit: give a --window instead"
            )
        sinks = 0 if start_size is None else start_size
        window = trained - sinks
    loaded = compiled(loaded, backend)
    if resume and session is not None:
        stream = Stream.load(session, loaded, tokenizer)
        given = {"sinks": sinks, "window": window, "chunk": chunk, "quantize": quantize_cache, "evict": evict}
        _check_same(stream, session, given, system)
    else:
        stream = Stream(
            loaded, tokenizer, sinks=sinks, window=window, chunk=chunk, quantize=quantize_cache, evict=evict
        )
    settings = {
        "max_new_tokens": None if max_new_tokens == "forever" else int(max_new_tokens),
        "temperature": temperature,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "dry_multiplier": dry,
        "seed": seed,
    }
    stream.autosave(session)
    conversation = Chat(stream, settings, system, session)
    if prompts is not None:
        answer_prompts(conversation, prompts)
    else:
        conversation.run()
