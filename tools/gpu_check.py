"""Is this library right and fast on this GPU? One command, at most eight minutes, torch alone, no network.

    python tools/gpu_check.py --out results            # all parts, on CUDA
    python tools/gpu_check.py --out results --parts laws decode-8b
    python tools/gpu_check.py --out results --device cpu      # the same with tiny shapes: is the script right?

    smoke        the first minute: the kernels of a Llama, checked, and 1B's time; if it fails, nothing else is run
    laws         every family in float64, float32 and half types on the device, against float64 on the CPU
    fast         the fused decoding step of every family against its modules
    tiles        products and attention of 8B, 7B and 1B with several tiles; the best are used by the later parts
    decode-8b    ms per token: the limit, fused kernels, the kernels of torch, place 10^6, int8; a filling window;
                 and where the time of a token goes, kernel by kernel
    decode-7b, decode-1b
    batch        8B with 32, 64 and 256 streams
    prefill      8B: a prompt of 4,096 and of 16,384 tokens, and scoring
    peers        8B by transformers: its dense prefill, and its compiled static cache (skipped where not installed)

Every part runs in a process of its own with a time limit, and writes each result as it comes: `results.jsonl` holds
what was reached, also when the command is killed. At the end `results.md` and `results.json` hold it all, with
ratios. The limit is the fastest plain read of the weights (without the embedding) and the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Part -> the most seconds that it may take.
PARTS = {
    "smoke": 75, "laws": 60, "fast": 110, "tiles": 100, "decode-8b": 110, "decode-7b": 60, "decode-1b": 45, "batch": 90,
    "prefill": 60, "peers": 110,
}  # fmt: skip
LEAST_SECONDS = 8.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="results", help="results.jsonl, .json and .md with this stem")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=470, help="seconds for all parts together")
    parser.add_argument(
        "--least", type=float, default=LEAST_SECONDS, help="a part is not started with fewer seconds left"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)  # the child's side
    parser.add_argument("--arguments", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with package_path() as folder:
        if args.part:
            sys.path[:0] = [folder, str(ROOT), str(ROOT / "tools")]
            from benchmark import gpu

            gpu.run(args.part, args.device, Path(args.out), args.arguments)
            return 0
        return run_parts(args, folder)


def package_path() -> tempfile.TemporaryDirectory[str]:
    """A folder from which `streamllm` can be imported without being installed.

    The package's parts lie in three folders of the tree.
    """
    made = tempfile.TemporaryDirectory(prefix="streamllm-")
    package = Path(made.name) / "streamllm"
    package.mkdir()
    for entry in (ROOT / "streamllm").iterdir():
        (package / entry.name).symlink_to(entry)
    for name in ("models", "weights"):
        (package / name).symlink_to(ROOT / name)
    return made


def run_parts(args: argparse.Namespace, folder: str) -> int:
    begin = time.monotonic()
    stem = Path(args.out)
    stem.parent.mkdir(parents=True, exist_ok=True)
    log = stem.with_suffix(".jsonl")
    log.write_text("")
    for part in args.parts:
        left = args.limit - (time.monotonic() - begin)
        if left < args.least:
            record(log, {"part": part, "failed": "not run: no time left"})
            continue
        run_part(part, args, min(PARTS[part], left), log)
        if part == "smoke" and any(row.get("ok") is False or row.get("failed") for row in rows_of(log)):
            break
    rows = rows_of(log)
    sys.path.insert(0, str(ROOT / "tools"))
    from benchmark.gpu_tables import summary

    text = summary(rows)
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps(rows, indent=1))
    print(text)
    print(f"{time.monotonic() - begin:.0f} s in all")
    return int(any(row.get("ok") is False for row in rows))


def rows_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def run_part(part: str, args: argparse.Namespace, seconds: float, log: Path) -> None:
    begin = time.monotonic()
    command = [sys.executable, __file__, "--part", part, "--device", args.device, "--out", str(log)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        code: int | None = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    took = round(time.monotonic() - begin, 1)
    failed = f"stopped after {seconds:.0f} s" if code is None else f"exit code {code}" if code else None
    record(log, {"part": part, "seconds": took, **({"failed": failed} if failed else {})})


def record(log: Path, row: dict[str, Any]) -> None:
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
