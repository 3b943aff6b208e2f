"""Kill a process with SIGKILL while it saves its session, many times; each time the session must load.

    python tools/kill_sessions.py --kills 200

A session that loads is never older than one interval of autosave. The embedded checkpoint, which has no chat template,
continues a text. The processes are forked from one that has loaded the model, so a kill takes a fraction of a second.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch

import streamllm

EVERY = 3  # tokens between two saves
SPREAD = 0.25  # seconds in which the moment of a kill lies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    moments = random.Random(given.seed)
    torch.set_num_threads(1)  # a forked process has no other threads
    model, tokenizer = streamllm.load(device="cpu")
    oldest = unfinished = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "session"
        for kill in range(given.kills):
            path.unlink(missing_ok=True)
            said = say_until_killed(model, tokenizer, path, moments.random() * SPREAD)
            stream = streamllm.Stream.load(path, model, tokenizer)
            age = said - stream.said
            if age > EVERY:
                raise SystemExit(
                    f"kill {kill}: the session is {age} tokens old, and it is saved every {EVERY}"
                )
            oldest = max(oldest, age)
            left = list(path.parent.glob(f".{path.name}.*.partial"))
            unfinished += len(left)
            for part in left:
                part.unlink()
    print(
        f"{given.kills} kills, {unfinished} of them while a file was written: every session loads; the oldest one "
        f"lacks {oldest} tokens, and it is saved every {EVERY}"
    )


def say_until_killed(model: torch.nn.Module, tokenizer: streamllm.Tokenizer, path: Path, after: float) -> int:
    """How many tokens a process had generated when it was killed, `after` seconds behind its first few saves."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            stream = streamllm.Stream(model, tokenizer, window=252)
            stream.autosave(path, every=EVERY)
            for _ in stream.generate("def ", temperature=1.0, seed=1):
                os.write(write, b".")
        finally:
            os._exit(1)
    os.close(write)
    said = 0
    while said <= 2 * EVERY:
        said += len(os.read(read, 1))
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    while more := os.read(read, 1 << 16):
        said += len(more)
    os.close(read)
    os.waitpid(child, 0)
    return said


if __name__ == "__main__":
    main()
