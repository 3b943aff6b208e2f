"""Is the millionth token like the thousandth? Time and memory of one long stream.

    python tools/flat.py                                  # the embedded checkpoint, a million tokens
    python tools/flat.py --model folder --tokens 100000 --early 5000 --span 5000

One stream is decoded greedily, one token at a time. Printed: the median time per token of the last `span` tokens
over that of `span` tokens after `early` (and of both in processor time, which a busy machine disturbs less), and
the resident memory at both. Exits with 1 where time grew by more than 3 % or memory by more than 1 %.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from array import array
from pathlib import Path

import torch

import streamllm
from streamllm.compiled import BACKENDS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or a hub name; default: the embedded checkpoint")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--early", type=int, default=5_000, help="where the first span begins")
    parser.add_argument("--span", type=int, default=10_000)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--window", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--backend", default="flat", choices=[*BACKENDS, "eager"], help="of streamllm.compile; eager: without"
    )
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.tokens < args.early + 2 * args.span:
        parser.error("the two spans overlap: give more tokens, or a shorter span")

    torch.set_num_threads(args.threads)
    model = streamllm.load_model(args.model, dtype=args.dtype, device="cpu")
    cache = streamllm.SinkCache(model, args.sinks, args.window)
    if cache.sinks + cache.window > args.early:
        parser.error(
            f"the window of {cache.window} is not full after {args.early} tokens: give a later --early"
        )
    if args.backend != "eager":
        model = streamllm.compile(model, backend=args.backend)

    spans = {"early": args.early, "late": args.tokens - args.span}
    wall = {name: array("d", bytes(8 * args.span)) for name in spans}
    busy = {name: array("d", bytes(8 * args.span)) for name in spans}
    resident = {}
    token = torch.zeros(1, 1, dtype=torch.int64)
    begin = time.perf_counter()
    with torch.inference_mode():
        for count in range(args.tokens):
            started, started_busy = time.perf_counter(), time.thread_time()
            token = model(token, cache, logits_to_keep=1)[:, -1].argmax(-1, keepdim=True)
            ended, ended_busy = time.perf_counter(), time.thread_time()
            for name, start in spans.items():
                if start <= count < start + args.span:
                    wall[name][count - start] = ended - started
                    busy[name][count - start] = ended_busy - started_busy
                if count == start + args.span - 1:
                    resident[name] = resident_bytes()
            if (count + 1) % 50_000 == 0:
                rate = (count + 1) / (time.perf_counter() - begin)
                print(f"{count + 1:,} tokens, {rate:.0f} per second", file=sys.stderr)
    result = {
        "tokens": args.tokens,
        "spans": {name: [start, start + args.span] for name, start in spans.items()},
        "ms_per_token": {name: statistics.median(times) * 1e3 for name, times in wall.items()},
        "processor_ms_per_token": {name: statistics.median(times) * 1e3 for name, times in busy.items()},
        "resident_bytes": resident,
        "cache": repr(cache),
        "torch": torch.__version__,
    }
    for name in ("ms_per_token", "processor_ms_per_token", "resident_bytes"):
        result[f"{name}_ratio"] = result[name]["late"] / result[name]["early"]
    print(json.dumps(result, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    sys.exit(result["ms_per_token_ratio"] > 1.03 or result["resident_bytes_ratio"] > 1.01)


def resident_bytes() -> int:
    """What the process holds in memory now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux: the most that it ever held
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
