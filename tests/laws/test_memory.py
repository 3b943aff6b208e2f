"""The law of memory: as much after 20,000 tokens as after 2,000, and for a prompt as much as for a chunk."""

from __future__ import annotations

import ctypes
import gc
import resource
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from streamllm.cache import SinkCache
from tests.laws.scenarios import text, tiny

MB = 1 << 20


def resident() -> int:
    """Bytes of memory that this process occupies, or at its most did where the system says no more."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def test_twenty_thousand_tokens_take_no_more_memory_than_two_thousand():
    """Observed: 0 to 0.1 MB. The keys and values of 18,000 tokens alone would be 4.6 MB."""
    model = tiny(kv_heads=4, layers=1, dtype=torch.float32)
    cache = SinkCache(model, sinks=4, window=60)
    held = cache.nbytes
    tokens = text(20_000)
    with torch.inference_mode():
        for t in range(20_000):
            model(tokens[:, t : t + 1], cache)
            if t + 1 == 2_000:
                gc.collect()
                before = resident()
    gc.collect()
    assert cache.seen.item() == 20_000
    assert cache.nbytes == held == 2 * 4 * 64 * 8 * 4
    assert resident() - before <= 2 * MB


def test_the_heap_is_trimmed_at_the_first_single_token_after_a_prompt(monkeypatch):
    trimmed = []
    monkeypatch.setattr("streamllm.cache.sink_cache.trim_heap", lambda: trimmed.append(cache.seen.item()))
    model = tiny(dtype=torch.float32)
    cache = SinkCache(model, sinks=2, window=10)
    for length in (100, 104, 4, 1, 1, 5, 1, 64, 1, 100):
        model(text(length), cache)
    assert trimmed == [208 + 1, 208 + 1 + 1 + 5 + 1 + 64 + 1]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library cannot")
def test_freed_memory_is_given_back():
    """Many small pieces below one that stays: it is only given back when asked for."""
    code = """
import ctypes
from tests.laws.test_memory import MB, resident
from streamllm.malloc import trim_heap
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
pieces = [malloc(50_000) for _ in range(2000)]
for piece in pieces:
    ctypes.memset(ctypes.c_void_p(piece), 1, 50_000)
for piece in pieces[:-1]:
    free(piece)
before = resident()
trim_heap()
print((before - resident()) // MB)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 80


class Allocated(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.add(x.untyped_storage(), x.untyped_storage().nbytes())
        return made

    def add(self, storage: torch.UntypedStorage, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.free, size)

    def free(self, size: int) -> None:
        self.now -= size


def most(chunks, keep=None, ragged=False, gradients=False):
    """The most bytes at once during a prompt of so many chunks of 64 tokens."""
    model = tiny(dtype=torch.float32)
    cache = SinkCache(model, sinks=2, window=10, batch_size=2, chunk=64)
    tokens = text(64 * chunks, rows=2)
    lengths = [64 * chunks - 3, 64 * chunks] if ragged else None
    model.requires_grad_(gradients)
    try:
        with Allocated() as allocated:
            model(tokens, cache, lengths=lengths, logits_to_keep=keep)
    finally:
        model.requires_grad_(False)
    return allocated.most


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_long_prompt_takes_no_more_memory_than_two_chunks(ragged, gradients):
    """Two, because the second meets a full ring. Observed: equal."""
    few, many = (most(chunks, 1, ragged, gradients) for chunks in (2, 50))
    assert few > 2 * 64 * 32 * 4  # the hidden states of a chunk: something was counted
    assert many <= few + 100  # a table of frequencies stays


def test_a_long_prompt_takes_no_more_memory_than_two_chunks_and_the_logits_asked_for():
    chunk_of_logits = 2 * 64 * 61 * 4
    few, many = most(2), most(50)
    assert many <= few + 2 * 48 * chunk_of_logits  # once in parts, once joined
