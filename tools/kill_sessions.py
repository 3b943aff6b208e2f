"""Kill a process with SIGKILL while it saves its session, many times; each time the session must load.

    python tools/kill_sessions.py --kills 200

A session that loads is never older than one interval of autosave. The embedded checkpoint, which has no chat template,
continues a text.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import streamllm

EVERY = 3  # tokens between two saves
CHILD = """
import sys, torch, streamllm
torch.set_num_threads(1)
model, tokenizer = streamllm.load()
path, every = sys.argv[1], int(sys.argv[2])
stream = streamllm.Stream(model, tokenizer, window=252)
stream.autosave(path, every=every)
for piece in stream.generate("def ", temperature=1.0, seed=1):
    print(stream.said, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    moments = random.Random(given.seed)
    model, tokenizer = streamllm.load()
    oldest = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "session"
        for kill in range(given.kills):
            path.unlink(missing_ok=True)
            with subprocess.Popen(
                [sys.executable, "-c", CHILD, str(path), str(EVERY)], stdout=subprocess.PIPE, text=True
            ) as child:
                assert child.stdout is not None
                said = 0
                while said <= 2 * EVERY:
                    said = int(child.stdout.readline())
                time.sleep(moments.random() / 4)
                child.send_signal(signal.SIGKILL)
                lines = child.stdout.read().split("\n")[:-1]
            said = int(lines[-1]) if lines else said
            stream = streamllm.Stream.load(path, model, tokenizer)
            age = said - stream.said
            if age > EVERY:
                raise SystemExit(
                    f"kill {kill}: the session is {age} tokens old, and it is saved every {EVERY}"
                )
            oldest = max(oldest, age)
    print(f"{given.kills} kills: every session loads; the oldest one lacks {oldest} tokens of {EVERY}")


if __name__ == "__main__":
    main()
