"""Benchmarks: time and memory of streamllm and of its alternatives, beside the limit of the machine.

    python tools/bench.py decode --model M --window 1024 --threads 1 2
    python tools/bench.py decode score --model S --dtype float32 bfloat16 --systems ours compiled dynamic
    python tools/bench.py load --model M
    python tools/bench.py memory --model S M --dtype float32 bfloat16 int8 int4 --systems ours compiled inductor
    python tools/bench.py decode --device cuda --model 7B --dtype bfloat16 --window 4092 \\
        --systems limit ours cudagraphs static static-compiled
    python tools/bench.py decode --device cuda --model 7B --dtype bfloat16 --systems ours cudagraphs --profile
    python tools/bench.py decode --streaming-llm ~/peer       # ~/peer/bin/python, with its package importable

The limit is the fastest plain read of the bytes that one token needs: the cache, and the weights without the
embedding. It is measured in the same run with the same threads. Every system runs in a process of its own. On a CPU
all processes are set up first and then measured in turn, round after round, so that load on the machine
disturbs all of them alike. On an accelerator, where two models may not fit, they run one after the other. Printed
are the median of the rounds, the lowest and the highest, and the ratio to the limit.

`memory` measures what a process holds that has loaded a checkpoint and decodes, beside the least that it must hold:
the runtime (measured in the same process after it has run a tiny model), the weights and the cache.

Weights are random, because no measurement depends on their values. Streams are past eviction when the clock starts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmark.loading import load_rows
from benchmark.machine import cores_in_use, describe
from benchmark.memory import MEASURED_AFTER_TOKENS, measure_memory, memory_rows, memory_table
from benchmark.ours import BACKEND_OF
from benchmark.profiling import counts_per_token
from benchmark.spec import SIZES, Spec
from benchmark.systems import PEERS, SYSTEMS, is_supported, tokens_per_round
from benchmark.tables import plot, timing_rows, timing_table
from benchmark.worker import Worker, run_in_turn, work

BUSY_CORES = 0.2  # warn where other processes use more
PROFILED_TOKENS = 50
MEMORY_SYSTEMS = ("ours", "compiled", "inductor")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="+", choices=["decode", "prefill", "score", "load", "memory"])
    parser.add_argument("--model", nargs="+", default=["S", "M"], choices=list(SIZES))
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--window", nargs="+", type=int, default=[1024])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count() or 1])
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--systems", nargs="+", default=["limit", "ours", "compiled", "dynamic", "static"],
        help=f"of {', '.join(name for name in SYSTEMS if name not in PEERS)}",
    )  # fmt: skip
    parser.add_argument(
        "--streaming-llm", metavar="FOLDER", help="an environment with its package on the path"
    )
    parser.add_argument("--attention-sinks", metavar="FOLDER", help="an environment that has attention_sinks")
    parser.add_argument(
        "--llama-cpp", metavar="FOLDER", help="an environment that has llama-cpp-python and gguf"
    )
    parser.add_argument(
        "--profile", action="store_true",
        help="only count synchronizations, launches and kernels per token, of systems of this library",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--tokens", type=int,
        help="per round; default: 20 to decode (S: up to 200), 2 windows to score or prefill",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    machine = describe()
    print(json.dumps(machine))
    if machine["others"] > BUSY_CORES:
        print(f"warning: others use {machine['others']} cores: compare, but do not quote", file=sys.stderr)
    peers = {name: os.path.expanduser(folder) for name in PEERS
             if (folder := getattr(args, name.replace("-", "_")))}  # fmt: skip
    systems = [name for name in SYSTEMS if name in args.systems or name in peers]
    threads = args.threads if args.device == "cpu" else args.threads[-1:]
    tasks = [task for task in args.tasks if task not in ("load", "memory")]
    specs = [spec for task in tasks for spec in settings(args, task, threads, args.device, args.tokens or 0)]
    if args.profile:
        print_profiles(specs, [name for name in args.systems if name in BACKEND_OF])
        return
    rows: list[dict[str, Any]] = []
    for spec in specs:
        timed = time_systems(spec, systems, peers, args.rounds)
        rows += timed
        print(timing_table(timed), flush=True)
    if "load" in args.tasks:
        loaded = load_rows(args.model, args.dtype, args.rounds)
        rows += loaded
        print(timing_table(loaded))
    if "memory" in args.tasks:
        measured = [
            replace(spec, system=system)
            for spec in settings(args, "memory", args.threads, "cpu", max(MEASURED_AFTER_TOKENS))
            for system in systems
            if system in MEMORY_SYSTEMS
        ]
        for row in memory_rows(measured):
            rows.append(row)
            print(memory_table([row]), flush=True)
    cores = cores_in_use()
    if cores > BUSY_CORES:
        print(f"warning: others use {cores:.2f} cores now", file=sys.stderr)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    if args.plot:
        plot(rows, args.plot)


def settings(
    args: argparse.Namespace, task: str, threads: Sequence[int], device: str, tokens: int
) -> list[Spec]:
    """A Spec without a system for each combination of the options. Tokens 0: systems.tokens_per_round."""
    return [
        Spec("", task, model, dtype, window, batch, count, device, tokens)
        for model in args.model for dtype in args.dtype for window in args.window
        for batch in args.batch for count in threads
    ]  # fmt: skip


def print_profiles(specs: Sequence[Spec], systems: Sequence[str]) -> None:
    for spec in specs:
        for system in systems:
            counts = counts_per_token(replace(spec, system=system, tokens=spec.tokens or PROFILED_TOKENS))
            print(json.dumps({"what": spec.label, "system": system, **counts}))


def time_systems(
    setting: Spec, systems: Sequence[str], peers: dict[str, str], rounds: int
) -> list[dict[str, Any]]:
    """One row for each system that supports the setting. `peers`: the folder of a peer's environment."""
    workers = []
    for system in systems:
        spec = replace(setting, system=system)
        if not is_supported(spec):
            continue
        folder = peers.get(system)
        python = os.path.join(folder, "bin", "python") if folder else sys.executable
        spec = replace(spec, tokens=spec.tokens or tokens_per_round(spec))
        workers.append(Worker(spec, python, folder))
        if setting.device != "cpu":  # two models may not fit into the memory of an accelerator
            run_in_turn(workers[-1:], rounds)
    if setting.device == "cpu":
        run_in_turn(workers, rounds)
    return list(timing_rows(workers))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Spec(**json.loads(sys.argv[2])))
    elif sys.argv[1:2] == ["--memory"]:
        print(json.dumps(measure_memory(Spec(**json.loads(sys.argv[2])), *sys.argv[3:])))
    else:
        main()
