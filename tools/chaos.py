"""Chaos: clients of one engine join, leave, cancel, fail, read slowly, save and go on at random.

    python tools/chaos.py --minutes 10

Each stream has one of a pool of prompts with settings. The text of each was computed before in float64, by a stream
alone. Whatever happens, the pieces of a stream must be a beginning of that text, and all of it where the stream was
read to its end. After a warm-up, resident memory, threads and open files must not grow. Exits with 1 where something
differs.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import gc
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import streamllm
from streamllm.status import resident_bytes

SIZES = {"sinks": 4, "window": 60}
PROMPTS = [
    "def ",
    "class Reader:\n",
    "import os\n\n\ndef read(path):\n    return",
    "# a list of all names\n",
    "x",
    "for ",
]
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 40, "repetition_penalty": 1.1},
    {"temperature": 1.2, "top_p": 0.9, "stop": ["return", "self"]},
    {"temperature": 1.0, "min_p": 0.05, "presence_penalty": 0.5},
]
POOL, LONGEST = 40, 40  # streams whose text is known, and their largest max_new_tokens
# Fragments of the allocator, and steps that are recorded late; thousands of streams that leak would be more.
MAY_GROW = {"resident bytes": 16e6, "objects": 20}
MAX_WAIT = 60.0  # seconds; where no stream ends for longer, there is a fault


class Failed(Exception):
    """Raised on purpose."""


class Job:
    """A prompt with settings, and the pieces of its text alone."""

    def __init__(self, model: torch.nn.Module, tokenizer: streamllm.Tokenizer, number: int) -> None:
        self.prompt = PROMPTS[number % len(PROMPTS)]
        self.options = {
            **SETTINGS[number % len(SETTINGS)],
            "seed": number,
            "max_new_tokens": 5 + number * 7 % LONGEST,
        }
        stream = streamllm.Stream(model, tokenizer, **SIZES)
        self.pieces = list(stream.generate(self.prompt, **self.options))


class Clients:
    """What clients do, and what went wrong."""

    def __init__(self, engine: streamllm.Engine, jobs: list[Job], folder: Path) -> None:
        self.engine, self.jobs, self.folder = engine, jobs, folder
        self.done: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.until = 0.0

    def check(self, what: str, job: Job, got: list[str], whole: bool) -> None:
        wanted = job.pieces if whole else job.pieces[: len(got)]
        if got != wanted:
            self.wrong.append(f"{what}: {got[:50]} is not {wanted[:50]}")
        self.done[what] += 1

    def work(self, number: int) -> None:
        """One client after the other in a thread, until the time is over."""
        dice = random.Random(number)
        actions: list[Callable[[random.Random, Job], None]] = [
            self.read, self.read, self.read_slowly, self.cancel, self.drop, self.fail, self.detach, self.save,
        ]  # fmt: skip
        while time.monotonic() < self.until and not self.wrong:
            try:
                dice.choice(actions)(dice, dice.choice(self.jobs))
            except Exception as error:
                self.wrong.append(f"{type(error).__name__}: {error}")

    def read(self, dice: random.Random, job: Job) -> None:
        self.check("read", job, list(self.engine.submit(job.prompt, **job.options)), True)

    def read_slowly(self, dice: random.Random, job: Job) -> None:
        got = []
        for piece in self.engine.submit(job.prompt, ahead=dice.randrange(1, 4), **job.options):
            got.append(piece)
            time.sleep(dice.choice([0, 0, 0.005]))
        self.check("read slowly", job, got, True)

    def cancel(self, dice: random.Random, job: Job) -> None:
        request = self.engine.submit(job.prompt, **job.options)
        got = [piece for _, piece in zip(range(dice.randrange(20)), request, strict=False)]
        request.cancel()
        self.check("cancelled", job, got + list(request), False)

    def drop(self, dice: random.Random, job: Job) -> None:
        request = self.engine.submit(job.prompt, ahead=3, **job.options)
        got = [piece for _, piece in zip(range(dice.randrange(5)), request, strict=False)]
        self.check("dropped", job, got, False)

    def fail(self, dice: random.Random, job: Job) -> None:
        left, got = [dice.randrange(10)], list[str]()

        def fails(*given: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Failed
            got.append(given[0])
            return given[-1]

        in_piece = dice.random() < 0.5
        kind = {"on_piece": fails} if in_piece else {"logits_processor": fails}
        request = self.engine.submit(job.prompt, **kind, **job.options)
        try:
            read = list(request)
        except Failed:
            self.check("failed", job, got if in_piece else [], False)
        else:
            self.check("ended before it failed", job, got if in_piece else read, True)

    def detach(self, dice: random.Random, job: Job) -> None:
        self.go_on("detached", dice, job, lambda stream: stream)

    def save(self, dice: random.Random, job: Job) -> None:
        path = self.folder / f"{threading.get_ident()}.session"

        def saved(stream: streamllm.Stream) -> streamllm.Stream:
            stream.save(path)
            return streamllm.Stream.load(path, self.engine.model, self.engine.tokenizer)

        self.go_on("saved", dice, job, saved)

    def go_on(
        self,
        what: str,
        dice: random.Random,
        job: Job,
        between: Callable[[streamllm.Stream], streamllm.Stream],
    ) -> None:
        """Read a part, take the stream out, and go on with it in the engine."""
        request = self.engine.submit(job.prompt, **job.options)
        got = [piece for _, piece in zip(range(dice.randrange(10)), request, strict=False)]
        try:
            stream = request.detach()
        except RuntimeError:  # it has ended already
            self.check("ended before it was " + what, job, got + list(request), True)
            return
        stream = between(stream)
        got += list(request)
        left = job.options["max_new_tokens"] - stream.said
        if stream.finish_reason is None and left > 0:
            got += list(self.engine.submit("", stream=stream, **{**job.options, "max_new_tokens": left}))
        self.check(what, job, got, True)

    async def read_by_asyncio(self, count: int) -> None:
        async def client(number: int) -> None:
            dice = random.Random(1000 + number)
            while time.monotonic() < self.until and not self.wrong:
                job, got = dice.choice(self.jobs), list[str]()
                request = self.engine.submit(job.prompt, ahead=dice.choice([1, 5, None]), **job.options)
                if dice.random() < 0.2:  # the task is cancelled while it reads
                    task = asyncio.ensure_future(self.pieces(request, got))
                    await asyncio.sleep(dice.random() * 0.05)
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                    self.check("task cancelled", job, got, False)
                else:
                    await self.pieces(request, got)
                    self.check("asyncio", job, got, True)

        await asyncio.gather(*(client(number) for number in range(count)))

    async def pieces(self, request: Any, got: list[str]) -> None:
        async for piece in request:
            got.append(piece)


def held(engine: streamllm.Engine) -> dict[str, int]:
    """What the process holds when no client is there."""
    end = time.monotonic() + MAX_WAIT
    while engine.running or engine.queued:
        if time.monotonic() > end:
            raise SystemExit(
                f"{engine.running} streams stay in the engine, {engine.queued} wait: nobody reads them"
            )
        gc.collect()
        time.sleep(0.05)
    gc.collect()  # errors and their tracebacks are cycles
    return {
        "resident bytes": resident_bytes() or 0,
        "threads": threading.active_count(),
        "open files": len(os.listdir("/proc/self/fd")),
        "objects": sum(type(found).__module__.startswith("streamllm") for found in gc.get_objects()),
    }


def run(clients: Clients, threads: int, seconds: float) -> None:
    clients.until = time.monotonic() + seconds
    workers = [
        threading.Thread(target=clients.work, args=(number,), daemon=True) for number in range(threads)
    ]
    workers.append(
        threading.Thread(target=lambda: asyncio.run(clients.read_by_asyncio(threads // 2)), daemon=True)
    )
    for worker in workers:
        worker.start()
    done, since = 0, time.monotonic()
    while alive := [worker for worker in workers if worker.is_alive()]:
        alive[0].join(1.0)
        now = sum(clients.done.values())
        if now != done:  # on a busy machine, the last streams may take long
            done, since = now, time.monotonic()
        elif time.monotonic() - since > MAX_WAIT:
            clients.wrong.append(f"{len(alive)} clients wait for pieces that do not come")
            return


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--threads", type=int, default=12, help="clients in threads; half as many more in asyncio"
    )
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--compile", dest="backend", help="a backend of streamllm.compile")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = streamllm.load(device="cpu", dtype="float64")
    jobs = [Job(model, tokenizer, number) for number in range(POOL)]
    used = streamllm.compile(model, args.backend) if args.backend else model
    seconds = 60 * args.minutes
    with (
        tempfile.TemporaryDirectory() as folder,
        streamllm.Engine(used, tokenizer, slots=args.slots, **SIZES) as engine,
    ):
        clients = Clients(engine, jobs, Path(folder))
        run(clients, args.threads, seconds / 2)  # warms up
        before = held(engine)
        run(clients, args.threads, seconds / 2)
        after = held(engine)
    print(f"{sum(clients.done.values())} streams: {dict(clients.done)}")
    for what, count in before.items():
        print(f"{what}: {count:,} after one half, {after[what]:,} at the end")
        if after[what] - count > MAY_GROW.get(what, 0):
            clients.wrong.append(f"{what} grew")
    if any(thread.name == "streamllm engine" for thread in threading.enumerate()):
        clients.wrong.append("the engine's thread did not end")
    for wrong in clients.wrong:
        print(f"wrong: {wrong}")
    sys.exit(bool(clients.wrong))


if __name__ == "__main__":
    main()
