"""How much memory a process keeps after many lengths and many windows: `python tools/variety.py --dtype bfloat16`.

Each measurement runs in a process of its own, on a small random Llama. It prints the resident memory above that after
the first forward, in MB:

    dense      1,200 forwards without a cache, of 1 … 1,200 tokens in random order
    prompts    the same lengths through one cache, which is reset between them
    windows    300 streams with windows of 20 … 319, each decoded past its window by the flat backend
    ragged     400 batches of 4 rows with random lengths up to 300
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import torch

import streamllm
from streamllm.cache import SinkCache
from streamllm.models import linear
from streamllm.models.llama import Config, Model
from streamllm.models.quantized import FORMATS
from streamllm.models.rotary import Rope

MEASUREMENTS = ("dense", "prompts", "windows", "ragged")


def resident_mb() -> float:
    """Resident memory of this process, after what is freed was given back."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def small_llama(dtype: str) -> Model:
    config = Config(
        vocab_size=1000, width=256, mlp_width=688, layers=2, heads=4, kv_heads=2, head_dim=64,
        rope=Rope(10000.0, 64), trained_length=4096, norm_eps=1e-5, activation="silu", attention_bias=False,
        mlp_bias=False, tied=False,
    )  # fmt: skip
    model = Model(config).requires_grad_(False).eval()
    generator = torch.Generator("cpu").manual_seed(0)
    for weight in model.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float32, device="cpu") * 0.05)
    model.to(torch.bfloat16 if dtype in FORMATS else getattr(torch, dtype))
    if dtype in FORMATS:
        linear.quantize(model, dtype)
    else:
        linear.arrange(model)
    return model


def forwards(what: str, model: Model, lengths: int) -> Iterator[Callable[[], object]]:
    """The forwards of a measurement, the first one included."""
    chance = random.Random(0)
    tokens = torch.randint(0, 1000, (4, lengths), dtype=torch.int64, device="cpu")
    order = list(range(1, lengths + 1))
    chance.shuffle(order)
    if what == "windows":
        flat = streamllm.compile(model, "flat")
        for window in range(20, 20 + lengths // 4):
            cache = SinkCache(flat, 4, window)
            yield lambda cache=cache: [flat(tokens[:1, i : i + 1], cache) for i in (*range(3), 5)]  # type: ignore[misc]
        return
    if what == "ragged":
        cache = SinkCache(model, 4, 1020, batch_size=4)
        for _ in range(lengths // 3):
            counts = [chance.randint(1, min(300, lengths)) for _ in range(4)]
            yield (
                lambda counts=counts: (  # type: ignore[misc]
                    cache.reset(),
                    model(tokens[:, : max(counts)], cache, lengths=counts, logits_to_keep=1),
                )
            )
        return
    for length in (lengths, *order):
        if what == "dense":
            yield lambda length=length: model(tokens[:1, :length])  # type: ignore[misc]
        else:
            cache = SinkCache(model, 4, 1020)
            yield lambda length=length, cache=cache: model(tokens[:1, :length], cache, logits_to_keep=1)  # type: ignore[misc]


def growth(what: str, dtype: str, lengths: int) -> float:
    """MB above the memory after the first forward."""
    model, first = small_llama(dtype), None
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for forward in forwards(what, model, lengths):
            forward()
            first = resident_mb() if first is None else first
    assert first is not None
    return resident_mb() - first


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "float16", "int8", "int4"])
    parser.add_argument("--measure", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    parser.add_argument("--lengths", type=int, default=1200)
    parser.add_argument("--here", action="store_true", help="measure in this process, and print one number")
    arguments = parser.parse_args()
    if arguments.here:
        torch.set_num_threads(1)
        print(f"{growth(arguments.measure[0], arguments.dtype[0], arguments.lengths):.1f}")
        return
    for dtype in arguments.dtype:
        for what in arguments.measure:
            command = [sys.executable, __file__, "--here", "--dtype", dtype, "--measure", what]
            command += ["--lengths", str(arguments.lengths)]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"{dtype:9} {what:8} {float(result.stdout):7.1f} MB", flush=True)


if __name__ == "__main__":
    main()
