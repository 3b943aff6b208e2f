"""Time of loading a checkpoint, of imports, and of the first token. Every measurement is a new process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark.spec import ROUNDED, SIZES
from benchmark.tables import timing_row


def load_rows(sizes: Sequence[str], dtypes: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Rows, in seconds.

    Loading is compared with a plain read of the file, both with the file on disk and with it in the page cache.
    The import of streamllm is compared with that of torch.
    """
    rows = []
    for size in sizes:
        for dtype in dtypes:
            if dtype in ROUNDED:
                continue
            with tempfile.TemporaryDirectory() as folder:
                write_checkpoint(folder, size, dtype)
                file = Path(folder) / "model.safetensors"
                times: dict[tuple[str, str], list[float]] = {}
                for _ in range(rounds):
                    for source in ("disk", "memory"):
                        for code in (_READ, _LOAD):
                            if source == "disk":
                                _drop_from_page_cache(file)
                            times.setdefault((source, code), []).append(float(_run_python(code, folder)))
                for source in ("disk", "memory"):
                    label, reads = f"load {size} {dtype} from {source}", times[source, _READ]
                    rows.append(timing_row(label, "plain read", reads, nbytes=file.stat().st_size))
                    rows.append(timing_row(label, "streamllm.load_model", times[source, _LOAD], reads))
    imports: dict[str, list[float]] = {"torch": [], "streamllm": []}
    first_token = []
    for _ in range(rounds):
        for name, seconds in imports.items():
            seconds.append(float(_run_python(_IMPORT, name)))
        with contextlib.suppress(RuntimeError):  # a tree without the embedded checkpoint
            first_token.append(float(_run_python(_FIRST_TOKEN)))
    rows.append(timing_row("import", "torch", imports["torch"]))
    rows.append(timing_row("import", "streamllm", imports["streamllm"], imports["torch"]))
    if first_token:
        rows.append(timing_row("first token", "embedded checkpoint, after import", first_token))
    return rows


def write_checkpoint(folder: str, size: str, dtype: str) -> None:
    """Writes a random Llama in the Hugging Face layout."""
    _run_python(_WRITE, folder, json.dumps(SIZES[size]), dtype)


def _drop_from_page_cache(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _run_python(code: str, *arguments: str) -> str:
    """The last line that the code prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.strip().rpartition("\n")[2]


_WRITE = """
import json, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
folder, size, dtype = sys.argv[1], json.loads(sys.argv[2]), getattr(torch, sys.argv[3])
config = LlamaConfig(
    vocab_size=size["vocab_size"], hidden_size=size["width"], intermediate_size=size["mlp_width"],
    num_hidden_layers=size["layers"], num_attention_heads=size["heads"],
    num_key_value_heads=size["kv_heads"])
LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
"""
_READ = """
import sys, time
buffer = bytearray(1 << 24)
begin = time.perf_counter()
with open(sys.argv[1] + "/model.safetensors", "rb", buffering=0) as file:
    while file.readinto(buffer):
        pass
print(time.perf_counter() - begin)
"""
_LOAD = """
import sys, time
from streamllm import load_model  # the package imports torch here, not at `import streamllm`
begin = time.perf_counter()
model = load_model(sys.argv[1], device="cpu")
print(time.perf_counter() - begin)
"""
_IMPORT = """
import importlib, sys, time
begin = time.perf_counter()
importlib.import_module(sys.argv[1])
print(time.perf_counter() - begin)
"""
_FIRST_TOKEN = """
import time
from streamllm import Stream, load
begin = time.perf_counter()
model, tokenizer = load()
next(Stream(model, tokenizer).generate("def "))
print(time.perf_counter() - begin)
"""
