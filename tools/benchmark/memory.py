"""Resident memory of a process that loads a checkpoint and decodes, beside the least that it must hold.

That least is the runtime, the weights and the cache. The runtime is the resident memory of the same process after it
has loaded a tiny model and decoded with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from benchmark.loading import write_checkpoint
from benchmark.ours import compiled_for
from benchmark.spec import SINKS, Spec, random_tokens
from benchmark.worker import PROGRAM, environment

MEASURED_AFTER_TOKENS = (200, 2000)
TINY_TOKENS = 20  # decoded by the tiny model


def memory_rows(specs: Sequence[Spec]) -> Iterator[dict[str, Any]]:
    """One row for each Spec: bytes held while decoding, and their ratio to what must be held."""
    with tempfile.TemporaryDirectory() as folder:
        for spec in specs:
            yield _memory_row(spec, folder)


def _memory_row(spec: Spec, folder: str) -> dict[str, Any]:
    stored = spec.computes_in
    checkpoints = {size: f"{folder}/{size}/{stored}" for size in ("tiny", spec.model)}
    for size, path in checkpoints.items():
        if not os.path.exists(path):
            write_checkpoint(path, size, stored)
    paths = [checkpoints["tiny"], checkpoints[spec.model]]
    command = [sys.executable, PROGRAM, "--memory", json.dumps(asdict(spec)), *paths]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(spec))
    row = {"place": spec.label, **asdict(spec)}
    if done.returncode:
        return {**row, "failed": done.stderr.strip().rpartition("\n")[2]}
    held = json.loads(done.stdout)
    needed = held["runtime"] + held["weights"] + held["cache"]
    return {**row, **held, "ratio": max(held["resident"]) / needed}


def measure_memory(spec: Spec, tiny: str, folder: str) -> dict[str, Any]:
    """Decode past eviction with the checkpoint in `tiny`, then with the one in `folder`. Needs a process of its own.

    Returns bytes: runtime, weights, cache, and resident after each of MEASURED_AFTER_TOKENS.
    """
    import torch

    import streamllm
    from streamllm.status import resident_bytes

    torch.set_num_threads(spec.threads)
    prompt = random_tokens(replace(spec, model="tiny"), SINKS + spec.window)

    def decode(folder: str, measured_after: Sequence[int]) -> dict[str, Any]:
        model: Any = streamllm.load_model(folder, device="cpu", quantize=spec.quantize)
        cache = streamllm.SinkCache(model, SINKS, spec.window, spec.batch)
        model = compiled_for(spec, model)
        resident = []
        with torch.inference_mode():
            token = model(prompt, cache, logits_to_keep=1)[:, -1].argmax(-1, keepdim=True)
            for count in range(1, max(measured_after) + 1):
                token = model(token, cache, logits_to_keep=1)[:, -1].argmax(-1, keepdim=True)
                if count in measured_after:
                    resident.append(resident_bytes())
        tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
        weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return {"weights": weights, "cache": cache.nbytes, "resident": resident}

    runtime = decode(tiny, [TINY_TOKENS])["resident"][0]
    return {"runtime": runtime, **decode(folder, MEASURED_AFTER_TOKENS)}


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, in MB."""
    after = " | ".join(f"after {count:,} tokens" for count in MEASURED_AFTER_TOKENS)
    lines = [f"| what | system | runtime | weights | cache | {after} | × their sum |", "|---" * 8 + "|"]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['place']} | {row['system']} | failed: {row['failed']} | | | | | |")
            continue
        held = [row["runtime"], row["weights"], row["cache"], *row["resident"]]
        numbers = " | ".join(f"{nbytes / 1e6:.1f}" for nbytes in held)
        lines.append(f"| {row['place']} | {row['system']} | {numbers} | {row['ratio']:.3f} |")
    return "\n".join(lines)
