"""A process that sets up one system and runs rounds on request.

Each line on its standard input asks for a round. Its standard output has one line of JSON after the setup, and one
after each round.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmark.spec import Spec
from benchmark.systems import SYSTEMS

PROGRAM = str(Path(__file__).resolve().parents[1] / "bench.py")
WARM_UP_ROUNDS = 3


class Worker:
    """The parent's side: starts the process and waits until it is set up.

    Attributes:
        seconds: of each round so far.
        failed: the message of the exception that ended the process, if there was one.
    """

    def __init__(self, spec: Spec, python: str, path: str | None = None) -> None:
        """`python` runs the worker; `path`: its PYTHONPATH."""
        self.spec = spec
        self.seconds: list[float] = []
        env = environment(spec)
        if path:
            env["PYTHONPATH"] = path
        self.process = subprocess.Popen(
            [python, PROGRAM, "--worker", json.dumps(asdict(spec))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip
        self.failed: str | None = None
        self._answer()

    def run_round(self) -> None:
        """Run a round, unless the process has failed."""
        if self.failed is None:
            assert self.process.stdin is not None
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            self.seconds += [answer["seconds"]] if (answer := self._answer()) else []

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            errors = self.process.stderr.read().strip().splitlines()
            line = json.dumps({"failed": errors[-1] if errors else "the process ended without a message"})
        answer = json.loads(line)
        self.failed = answer.get("failed")
        return answer  # type: ignore[no-any-return]


def run_in_turn(workers: Sequence[Worker], rounds: int) -> None:
    """Run `rounds` rounds of all workers in turn, then stop them."""
    for _ in range(rounds):
        for worker in workers:
            worker.run_round()
    for worker in workers:
        worker.stop()


def environment(spec: Spec) -> dict[str, str]:
    """The variables of a child process with `spec.threads` threads."""
    threads = str(spec.threads)
    return {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TQDM_DISABLE": "1"}


def work(spec: Spec) -> None:
    """The process's side."""
    out = os.fdopen(os.dup(1), "w")  # messages of a peer go to standard error, not between the answers
    os.dup2(2, 1)
    try:
        with contextlib.suppress(ImportError):
            import torch

            torch.set_num_threads(spec.threads)
        run = SYSTEMS[spec.system](spec)
        for _ in range(WARM_UP_ROUNDS):
            run()
    except Exception as error:
        print(json.dumps({"failed": f"{type(error).__name__}: {error}"}), file=out, flush=True)
        return
    print(json.dumps({"ready": True}), file=out, flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        run()
        print(json.dumps({"seconds": time.perf_counter() - begin}), file=out, flush=True)
