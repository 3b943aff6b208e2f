"""Real Ctrl-C at random moments: how many streams lose text, show it twice, or end with another cache.

    python -m tools.signals [STREAMS] [SIGNALS]

Each stream reads a prompt, generates, reads a second text and generates again; some have a stop string. A timer sends
SIGINT to the process at random moments, and the stream goes on after each one. Its text, its tokens and its cache are
compared with those of a stream that was not interrupted. Half of the streams run a forward ahead, as on CUDA. Ends
with status 1 where one differs, or where fewer signals than asked for arrived.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import streamllm
from streamllm import Stream, loop
from tests.unit.conftest import write_llama, write_tokenizer

TEXTS = ("def once(upon):\n    return", "one two three four", "流れは続く, naïve café", "for name in names:")
TOKENS = 14  # in each of the two calls
MAX_SIGNALS = 24  # for one stream
CACHE_COUNTS = ("seen", "held", "rewindable")
PROBE = torch.tensor([[5, 40, 7]])
TOLERANCE = 1e-3  # standard deviations of the logits: a prompt that is read in other parts rounds differently


@dataclass
class Signals:
    """Sends SIGINT once, at a random moment of the next `longest` seconds, for each call of `arm`."""

    draw: random.Random
    longest: float
    left: int
    arrived: int = 0

    def arm(self) -> None:
        if self.left > 0:
            signal.setitimer(signal.ITIMER_REAL, self.draw.uniform(1e-6, self.longest))

    def disarm(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def run(self, step: Callable[[], object]) -> None:
        """Run a step, which an interrupt may end early."""
        try:
            self.arm()
            step()
            self.disarm()
        except KeyboardInterrupt:
            self.arrived += 1
            self.left -= 1


def converse(stream: Stream, case: dict[str, Any], signals: Signals) -> str:
    """The text of both calls, with as many attempts as the signals need."""
    pieces: list[str] = []
    for text in case["texts"]:
        _read(stream, text, signals)
        said = _shown_tokens(stream)
        stream.finish_reason = None
        while stream.finish_reason is None:
            limit = TOKENS - (_shown_tokens(stream) - said)

            def step(limit: int = limit) -> None:
                # list.extend is one call into C: no interrupt falls between a piece and its place in the list.
                pieces.extend(stream.generate(max_new_tokens=limit, stop=case["stop"], **case["settings"]))

            signals.run(step)
    return "".join(pieces)


def _read(stream: Stream, text: str, signals: Signals) -> None:
    """Let the stream read a text once. After an interrupt, the end of its tokens tells whether it was pushed."""
    engine = stream._loop
    while True:
        stream._finish_cut()  # else the end is that before a stop string was cut off
        end = engine.end + (engine.drawn is not None)
        signals.run(lambda: stream.feed(text))
        if engine.end > end:
            return


def _shown_tokens(stream: Stream) -> int:
    return stream.said - stream._view.unsaid


def differences(got: Stream, wanted: Stream) -> list[str]:
    """What differs between the tokens and the caches of two streams that have shown the same text."""
    found = []
    if got._loop.last_tokens(10**6) != wanted._loop.last_tokens(10**6):
        found.append("tokens")
    if got.seen != wanted.seen or got.said != wanted.said:
        found.append("counts")
    if any(not torch.equal(getattr(got.cache, name), getattr(wanted.cache, name)) for name in CACHE_COUNTS):
        found.append("counts of the cache")
    # Keys of tokens that left may remain in slots that no query sees, so what a query sees is compared.
    with torch.inference_mode():
        logits = [stream.model(PROBE, stream.cache)[0] for stream in (got, wanted)]
    if (logits[0] - logits[1]).abs().max() > TOLERANCE * logits[1].std():
        found.append("logits of the next tokens")
    return found


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    least = int(sys.argv[2]) if len(sys.argv) > 2 else 3000
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with tempfile.TemporaryDirectory() as folder:
        vocab_size = write_tokenizer(Path(folder), bos=True)
        model, tokenizer = streamllm.load(write_llama(Path(folder), vocab_size))
    models = {"modules": model, "flat": streamllm.compile(model, "flat")}
    draw = random.Random(0)
    arrived, wrong = Counter[str](), list[str]()
    start = time.monotonic()
    for number in range(count):
        backend, ahead = ("modules", "flat")[number % 2], number // 2 % 2
        loop.RUN_AHEAD = ("cpu",) if ahead else ()
        settings: dict[str, Any] = {"seed": number, "eos": []}
        if number % 3:
            settings |= {"temperature": 0.9, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3}
        case = {"texts": draw.sample(TEXTS, 2), "stop": (), "settings": settings}

        def new(backend: str = backend) -> Stream:
            return Stream(models[backend], tokenizer, sinks=2, window=7, chunk=4)

        plain = new()
        text = converse(plain, case, Signals(draw, 1.0, 0))
        if number % 5 == 4 and len(text) > 12:
            at = draw.randrange(2, 9)
            case["stop"] = (text[at : at + draw.randrange(1, 4)],)
            plain = new()
            text = converse(plain, case, Signals(draw, 1.0, 0))
        stream, signals = new(), Signals(draw, draw.choice((0.002, 0.01, 0.03)), MAX_SIGNALS)
        name = (
            f"stream {number}, {backend}{', ahead' if ahead else ''}{', stop string' if case['stop'] else ''}"
        )
        try:
            got = converse(stream, case, signals)
            found = (["text"] if got != text else []) + differences(stream, plain)
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        finally:
            signals.disarm()
        arrived[f"{backend}{', ahead' if ahead else ''}"] += signals.arrived
        if found:
            wrong.append(name)
            print(f"{name}: {', '.join(found)}", flush=True)
    for name, signals_there in arrived.items():
        print(f"{name:16} {signals_there:6} signals")
    print(
        f"{count} streams, {arrived.total()} signals, {len(wrong)} streams corrupt or lost, "
        f"{time.monotonic() - start:.0f} s"
    )
    sys.exit(bool(wrong) or arrived.total() < least)


if __name__ == "__main__":
    main()
