"""`streamllm batch`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from streamllm.commands.batch_lines import Line, Results, read_lines
from streamllm.commands.job import join_quietly
from streamllm.commands.loading import ModelChoice
from streamllm.commands.options import (
    OUTPUT_FILE,
    compile_option,
    compiled,
    dry_option,
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
from streamllm.commands.types import CountParamType

if TYPE_CHECKING:
    from streamllm.engine import Completion
    from streamllm.tensor_parallel import Job

SOME_FAILED = 1  # exit code
MAX_SLOTS = 4096


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", "-o", type=OUTPUT_FILE, help="The results.  [default: FILE.results.jsonl]")
@click.option(
    "--slots", type=CountParamType(1, MAX_SLOTS), default=32, show_default=True,
    help="Prompts that run at once; each takes the memory of a cache.",
)  # fmt: skip
@click.option("--retry-failed", is_flag=True, help="Try lines again that failed before.")
@model_options
@sinks_option
@window_option
@quantize_cache_option
@compile_option
@click.option(
    "--max-new-tokens",
    "-n",
    type=CountParamType(1),
    default=200,
    show_default=True,
    help="The longest text, in tokens.",
)
@temperature_option
@top_p_option
@repetition_penalty_option
@dry_option
@sampling_seed_option
@click.option("--stop", multiple=True, help="Stop before this text; may be given several times.")
@click.option("--ignore-eos", is_flag=True, help="Continue after the model's end-of-text token.")
@tensor_parallel_option
def batch(
    file: Path, output: Path | None, slots: int, retry_failed: bool, chosen: ModelChoice, sinks: int,
    window: int | None, quantize_cache: str | None, backend: str, max_new_tokens: int,
    temperature: float | None, top_p: float | None, repetition_penalty: float | None, dry: float | None,
    seed: int | None, stop: tuple[str, ...], ignore_eos: bool, tensor_parallel: bool,
) -> int:  # fmt: skip
    """Run a list of prompts through a model, many at once.

    Each line of FILE is a JSON object: {"prompt": "…"}, or {"messages": [{"role": "user", "content": "…"}]} for the
    model's chat template. It may have an "id" and "metadata", which are copied, and settings of its own:
    max_new_tokens, stop, seed, temperature, top_k and the others of streamllm.generate.

    A result is added to the output as soon as it is known: {"line": 1, "text": "…", "finish_reason": "eos",
    "tokens": 17}, or {"line": 2, "error": "…"}. The same command continues a run that was interrupted. With
    --seed, line n samples with seed + n. The exit code is 1 where lines failed. With --tensor-parallel, one process
    reads the lines and writes the results.
    """
    if "" in stop:
        raise click.UsageError("a stop string must not be empty")
    options = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
        "repetition_penalty": repetition_penalty, "dry_multiplier": dry, "stop": list(stop),
        **({"eos": []} if ignore_eos else {}),
    }  # fmt: skip
    same = {
        "model": chosen.name, "revision": chosen.revision, "precision": chosen.precision, "sinks": sinks,
        "window": window, "quantize cache": quantize_cache, "seed": seed, **options,
    }  # fmt: skip

    from streamllm.generation_config import SamplingSettings

    output = output or file.with_name(file.name + ".results.jsonl")
    job = join_quietly(chosen.device) if tensor_parallel else None
    with ExitStack() as files:
        written: Written | None = None

        def open_files() -> list[Line]:
            nonlocal written
            lines = read_lines(file, list(SamplingSettings.__annotations__), same)
            if not lines:
                raise ValueError(f"{file} has no lines")
            written = files.enter_context(Written(output, lines, retry_failed))
            return written.left

        # All processes compute all lines; only the first has files.
        left = job.from_first(open_files) if job else open_files()
        for line, result in _results(
            left, chosen, slots, sinks, window, quantize_cache, backend, seed, options, job
        ):
            if written is not None:
                written.add(line, result)
    return SOME_FAILED if written is not None and written.results.failed else 0


class Written:
    """The file of results with a progress bar. At the end, it says what was done."""

    def __init__(self, output: Path, lines: Sequence[Line], retry_failed: bool) -> None:
        self._output, self._count = output, len(lines)
        self.results = Results(output, lines, retry_failed)
        self.left = [line for line in lines if line.number not in self.results.done]

    def __enter__(self) -> Written:
        self.results.__enter__()
        self._bar = _progress(self._count, len(self.results.done))
        return self

    def add(self, line: Line, result: Mapping[str, Any]) -> None:
        self.results.add(line, result)
        self._bar.set_postfix(failed=len(self.results.failed), refresh=False)
        self._bar.update()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        done, failed = len(self.results.done), len(self.results.failed)
        rest = "" if done == self._count else "; run the same command again to continue"
        click.echo(
            f"{done} of {self._count} lines have a result, {failed} of them an error: {self._output}{rest}",
            err=True,
        )
        self.results.__exit__(kind, error, trace)


def _results(
    lines: Sequence[Line], chosen: ModelChoice, slots: int, sinks: int, window: int | None,
    quantize: str | None, backend: str, seed: int | None, options: Mapping[str, Any], job: Job | None,
) -> Iterator[tuple[Line, dict[str, Any]]]:  # fmt: skip
    """Each line with its result, in the order in which they end."""
    for line in lines:
        if line.error is not None:
            yield line, {"error": line.error}
    good = [line for line in lines if line.error is None]
    if not good:
        return

    from streamllm.engine import completions

    with job.all_or_none() if job else nullcontext():
        model, tokenizer = chosen.load(job is not None)
        slots = min(slots, len(good))
        model = compiled(model, backend)
        each = [{**({} if seed is None else {"seed": seed + line.number}), **line.settings} for line in good]
        found = completions(
            model, tokenizer, [line.prompt for line in good], slots=slots, sinks=sinks, window=window,
            quantize=quantize, each=each, **options,
        )  # fmt: skip
    for number, completion in found:
        yield good[number], _as_json(completion)


def _as_json(completion: Completion) -> dict[str, Any]:
    if completion.error is not None:
        return {"error": " ".join(str(completion.error).split()) or type(completion.error).__name__}
    found: dict[str, Any] = {
        "text": completion.text, "finish_reason": completion.finish_reason, "tokens": completion.tokens,
    }  # fmt: skip
    if completion.logprobs:
        found["logprobs"] = [[one.token, one.logprob, *map(list, one.top)] for one in completion.logprobs]
    return found


def _progress(total: int, done: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="line", disable=None)
