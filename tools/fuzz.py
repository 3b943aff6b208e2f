"""Fuzzer: loads checkpoints whose headers, indexes, configs, tokenizers and templates are changed at random.

    python tools/fuzz.py --cases 100000 --seed 1

Every case must end in one of the library's own exceptions, or in a model (or tokenizer, or prompt) that works.
Another exception, a crash, more than 10 s of work, or memory out of proportion to the files is a failure, and
the exit code is 1. A case depends only on the seed and its number: `--seed 1 --first 4711 --cases 1 --keep DIR`
repeats one and keeps its files.

The cases run in a child process, so that a crash or an endless loop ends only the child.
"""

from __future__ import annotations

import collections
import json
import os
import re
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from fuzz_cases import MESSAGES, TEXT, Bases, make_case
from tqdm import tqdm

import streamllm
from streamllm.chat import ChatTemplateError, render
from streamllm.weights.errors import shorten

MAX_SECONDS = 10  # of work for one case
MAX_MEGABYTES = 64  # of memory for one case, beyond 12 times the size of its files
MAX_ADDRESS_SPACE_MEGABYTES = 4096  # of the child, beyond what it has at the start
CASES_PER_CHILD = 2000
MAX_MESSAGE_CHARACTERS = 2000

OWN_ERRORS = (streamllm.CheckpointError, streamllm.TokenizerError, ChatTemplateError)


def run_case(folder: Path, name: str) -> str:
    """The outcome of a case: "loaded", or the name of our exception. Another exception is a failure."""
    try:
        if name == "chat_template.jinja":
            template = (folder / name).read_text(encoding="utf-8", errors="replace")
            text = render(template, MESSAGES, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
            assert isinstance(text, str)
            return "loaded"
        if not (folder / "config.json").exists():
            tokenizer = streamllm.load_tokenizer(folder)
            for special in (True, False):
                ids = tokenizer.encode(TEXT, add_special_tokens=special)
                assert isinstance(tokenizer.decode(ids, skip_special_tokens=special), str)
                for continuation in (True, False):
                    ids = tokenizer.encode_piece(TEXT, continuation=continuation, special_tokens=special)
                    assert all(0 <= index < tokenizer.vocab_size for index in ids)
            tokenizer.decode(range(0, tokenizer.vocab_size, 1 + tokenizer.vocab_size // 400))
            return "loaded"
        model = streamllm.load_model(folder, device="cpu")
        logits = model(torch.tensor([[0, 0, 0]]))  # every vocabulary has a token 0
        assert logits.shape[:2] == (1, 3)
        return "loaded"
    except OWN_ERRORS as error:
        message = str(error)
        assert message, "an error without a message"
        assert len(message) < MAX_MESSAGE_CHARACTERS, f"an error of {len(message)} characters"
        return type(error).__name__


def memory_megabytes(field: str) -> int:
    """A field of /proc/self/status."""
    found = re.search(field + r":\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) >> 10 if found else 0


def child(bases: Bases, seed: int, numbers: range, keep: Path | None, out: int) -> None:
    """Runs cases. Writes a JSON line to `out` before each case and one with its outcome after it."""

    def tell(*fields: object) -> None:
        os.write(out, (json.dumps(fields) + "\n").encode())

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the libraries print warnings about damaged files
    is_measured = True
    limit = (memory_megabytes("VmSize") + MAX_ADDRESS_SPACE_MEGABYTES) << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # so that the machine does not run out of memory
    with tempfile.TemporaryDirectory() as space:
        for number in numbers:
            name, files = make_case(bases, seed, number)
            folder = keep or Path(space) / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            for file, data in files.items():
                (folder / file).write_bytes(data)
            tell(number, name)
            try:
                Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            except OSError:
                is_measured = False
            before, begun = memory_megabytes("VmRSS"), time.process_time()
            try:
                outcome, fault = run_case(folder, name), ""
            except BaseException as error:
                outcome = "failed"
                where = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(where.filename).name}:{where.lineno}"
                fault = f"{type(error).__name__}: {shorten(str(error), 200)} at {place}"
            megabytes = memory_megabytes("VmHWM") - before
            if is_measured and megabytes > MAX_MEGABYTES + 12 * sum(map(len, files.values())) // 2**20:
                outcome, fault = "failed", f"{megabytes} MB of memory"
            seconds = time.process_time() - begun
            if seconds > MAX_SECONDS:
                outcome, fault = "failed", f"{seconds:.0f} s"
            tell(number, name, outcome, fault)
            if keep is None:
                for file in files:
                    (folder / file).unlink()
                folder.rmdir()


def run(
    seed: int,
    first: int,
    cases: int,
    seconds: float | None = None,
    keep: Path | None = None,
    report: Callable[[str], object] = print,
) -> tuple[collections.Counter[tuple[str, str]], list[tuple[int, str, str]]]:
    """Counts of (file mutated, outcome), and the failures as (number, file, failure)."""
    torch.set_num_threads(1)  # a process with threads must not fork
    bases = Bases()
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    failures: list[tuple[int, str, str]] = []
    end = time.monotonic() + seconds if seconds else None
    number, last = first, first + cases
    with tqdm(total=cases, unit="case", disable=None) as bar:
        while number < last and (end is None or time.monotonic() < end):
            receive, send = os.pipe()
            process = os.fork()
            if process == 0:
                os.close(receive)
                code = 1
                try:
                    child(bases, seed, range(number, min(number + CASES_PER_CHILD, last)), keep, send)
                    code = 0
                finally:
                    os._exit(code)
            os.close(send)
            begun: tuple[int, str] | None = None
            for fields in lines(receive, 6 * MAX_SECONDS):  # by the clock, because the machine may be busy
                if fields is None:
                    os.kill(process, signal.SIGKILL)
                    break
                if len(fields) == 2:
                    begun = fields[0], fields[1]
                    continue
                counts[fields[1], fields[2]] += 1
                if fields[2] == "failed":
                    failures.append((fields[0], fields[1], fields[3]))
                    report(f"case {fields[0]} ({fields[1]}): {fields[3]}")
                number, begun = fields[0] + 1, None
                bar.update()
                if end is not None and time.monotonic() > end:
                    os.kill(process, signal.SIGKILL)
                    break
            os.close(receive)
            _, code = os.waitpid(process, 0)
            stopped = end is not None and time.monotonic() > end
            if code != 0 and not stopped:
                if begun is None:
                    raise RuntimeError("the child process failed between two cases")
                hung = os.WIFSIGNALED(code) and os.WTERMSIG(code) == signal.SIGKILL
                exit_code = os.waitstatus_to_exitcode(code)
                failure = "it does not end" if hung else f"the process died ({exit_code})"
                counts[begun[1], "failed"] += 1
                failures.append((*begun, failure))
                report(f"case {begun[0]} ({begun[1]}): {failure}")
                number = begun[0] + 1
                bar.update()
    return counts, failures


def lines(pipe: int, seconds: float) -> Iterator[Any]:
    """The JSON lines of a pipe. After `seconds` without a line, the last value is None."""
    held = b""
    while True:
        if not select.select([pipe], [], [], seconds)[0]:
            yield None
            return
        data = os.read(pipe, 65536)
        if not data:
            return
        *whole, held = (held + data).split(b"\n")
        yield from map(json.loads, whole)


@click.command()
@click.option("--cases", default=100_000, show_default=True)
@click.option("--first", default=0, show_default=True, help="Number of the first case.")
@click.option("--seed", default=0, show_default=True)
@click.option("--seconds", type=float, help="Stop after this time.")
@click.option(
    "--keep", type=click.Path(path_type=Path), help="With --cases 1: a folder for the case's files."
)
def main(cases: int, first: int, seed: int, seconds: float | None, keep: Path | None) -> None:
    """Load checkpoints that are changed at random. Any outcome but our own exceptions is a failure."""
    if keep is not None and cases != 1:
        raise click.UsageError("--keep needs a single case: add --cases 1")
    begun = time.monotonic()
    counts, failures = run(seed, first, cases, seconds, keep, lambda text: tqdm.write(text, file=sys.stdout))
    outcomes = sorted({outcome for _, outcome in counts})
    click.echo(" " * 32 + "".join(f"{outcome:>19}" for outcome in outcomes))
    for file in sorted({file for file, _ in counts}):
        click.echo(f"{file:32}" + "".join(f"{counts[file, outcome]:19,}" for outcome in outcomes))
    took = time.monotonic() - begun
    click.echo(f"seed {seed}: {sum(counts.values()):,} cases in {took:,.0f} s, {len(failures):,} failures")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
