"""Compares time and memory per token at the beginning and at the end of one long stream.

    python tools/flat.py                                  # the embedded checkpoint, a million tokens
    python tools/flat.py --model folder --tokens 100000 --early 5000 --span 5000

One stream is decoded greedily, one token at a time. Two spans of `span` tokens are compared: one after the first
`early` tokens, and the last one of the stream. Printed are their median times per token, in wall time and in processor
time, which other processes disturb less; the resident memory at the end of each; and the ratios of late to early.
The exit code is 1 where the wall time grew by more than 3 % or the memory by more than 1 %.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from array import array
from pathlib import Path

import torch

import streamllm
from streamllm.compiled import BACKENDS
from streamllm.status import resident_bytes

MAX_TIME_RATIO, MAX_MEMORY_RATIO = 1.03, 1.01
PROGRESS_TOKENS = 50_000  # between two lines of progress


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or a hub name; default: the embedded checkpoint")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--early", type=int, default=5_000, help="tokens before the first span")
    parser.add_argument("--span", type=int, default=10_000)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--window", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--backend", default="flat", choices=[*BACKENDS, "eager"],
        help='of streamllm.compile; "eager": not compiled',
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.tokens < args.early + 2 * args.span:
        parser.error("the two spans overlap: give more tokens, or a shorter span")

    torch.set_num_threads(args.threads)
    model = streamllm.load_model(args.model, dtype=args.dtype, device="cpu")
    cache = streamllm.SinkCache(model, args.sinks, args.window)
    if args.backend != "eager":
        model = streamllm.compile(model, backend=args.backend)

    spans = {"early": args.early, "late": args.tokens - args.span}
    # Allocated before the stream starts, so that the measurements themselves do not grow.
    wall_seconds = {name: array("d", bytes(8 * args.span)) for name in spans}
    processor_seconds = {name: array("d", bytes(8 * args.span)) for name in spans}
    resident: dict[str, float] = {}
    token = torch.zeros(1, 1, dtype=torch.int64)
    begin = time.perf_counter()
    with torch.inference_mode():
        for count in range(args.tokens):
            wall_start, processor_start = time.perf_counter(), time.thread_time()
            token = model(token, cache, logits_to_keep=1)[:, -1].argmax(-1, keepdim=True)
            wall_end, processor_end = time.perf_counter(), time.thread_time()
            for name, start in spans.items():
                if start <= count < start + args.span:
                    wall_seconds[name][count - start] = wall_end - wall_start
                    processor_seconds[name][count - start] = processor_end - processor_start
                if count == start + args.span - 1:
                    resident[name] = resident_bytes() or math.nan  # NaN: the system does not tell
            if (count + 1) % PROGRESS_TOKENS == 0:
                rate = (count + 1) / (time.perf_counter() - begin)
                print(f"{count + 1:,} tokens, {rate:.0f} per second", file=sys.stderr)
    result = {
        "tokens": args.tokens,
        "spans": {name: [start, start + args.span] for name, start in spans.items()},
        "ms_per_token": median_ms(wall_seconds),
        "processor_ms_per_token": median_ms(processor_seconds),
        "resident_bytes": resident,
        "cache": repr(cache),
        "torch": torch.__version__,
    }
    for name in ("ms_per_token", "processor_ms_per_token", "resident_bytes"):
        result[f"{name}_ratio"] = result[name]["late"] / result[name]["early"]
    print(json.dumps(result, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    grew = result["ms_per_token_ratio"] > MAX_TIME_RATIO or result["resident_bytes_ratio"] > MAX_MEMORY_RATIO
    sys.exit(grew)


def median_ms(seconds: dict[str, array[float]]) -> dict[str, float]:
    return {name: statistics.median(times) * 1e3 for name, times in seconds.items()}


if __name__ == "__main__":
    main()
