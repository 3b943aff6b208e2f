"""The law of memory: it grows neither with the length of a stream nor with the length of a prompt."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys

import pytest
import torch

from streamllm.cache import SinkCache
from streamllm.status import resident_bytes
from tests.laws.allocated import Allocated
from tests.laws.scenarios import random_tokens, tiny_llama

MB = 1 << 20


def test_twenty_thousand_tokens_take_no_more_memory_than_two_thousand():
    """The limit is 2 MB. The keys and values of the other 18,000 tokens would take 4.6 MB."""
    model = tiny_llama(kv_heads=4, layers=1, dtype=torch.float32)
    cache = SinkCache(model, sinks=4, window=60)
    cache_bytes = cache.nbytes
    tokens = random_tokens(20_000)
    with torch.inference_mode():
        for t in range(20_000):
            model(tokens[:, t : t + 1], cache)
            if t + 1 == 2_000:
                gc.collect()
                before = resident_bytes()
    gc.collect()
    assert cache.seen.item() == 20_000
    assert cache.nbytes == cache_bytes == 2 * 4 * 64 * 8 * 4
    assert resident_bytes() - before <= 2 * MB


def test_the_heap_is_trimmed_at_the_first_single_token_after_a_prompt(monkeypatch):
    trimmed = []
    monkeypatch.setattr("streamllm.cache.rolling_cache.trim_heap", lambda: trimmed.append(cache.seen.item()))
    model = tiny_llama(dtype=torch.float32)
    cache = SinkCache(model, sinks=2, window=10)
    for length in (100, 104, 4, 1, 1, 5, 1, 64, 1, 100):
        model(random_tokens(length), cache)
    assert trimmed == [208 + 1, 208 + 1 + 1 + 5 + 1 + 64 + 1]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library has no malloc_trim")
def test_trimming_the_heap_returns_freed_memory_to_the_system():
    """Blocks that are freed below a block that is still used stay with the process until the heap is trimmed."""
    code = """
import ctypes
from streamllm.status import resident_bytes
from streamllm.malloc import trim_heap
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [malloc(50_000) for _ in range(2000)]
for block in blocks:
    ctypes.memset(ctypes.c_void_p(block), 1, 50_000)
for block in blocks[:-1]:
    free(block)
before = resident_bytes()
trim_heap()
print(before - resident_bytes())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) // MB > 80


def peak_bytes(chunks, keep=None, ragged=False, gradients=False):
    """The peak of allocated bytes during a prompt of `chunks` chunks of 64 tokens."""
    model = tiny_llama(dtype=torch.float32)
    cache = SinkCache(model, sinks=2, window=10, batch_size=2, chunk=64)
    tokens = random_tokens(64 * chunks, rows=2)
    lengths = [64 * chunks - 3, 64 * chunks] if ragged else None
    model.requires_grad_(gradients)
    try:
        with Allocated() as allocated:
            model(tokens, cache, lengths=lengths, logits_to_keep=keep)
    finally:
        model.requires_grad_(False)
    return allocated.peak


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_long_prompt_takes_no_more_memory_than_two_chunks(ragged, gradients):
    """Two chunks, because the first one finds an empty ring."""
    short, long = (peak_bytes(chunks, 1, ragged, gradients) for chunks in (2, 50))
    assert short > 2 * 64 * 32 * 4  # the hidden states of a chunk, so allocations are counted
    assert long <= short + 100  # a cached table of frequencies


def test_a_long_prompt_takes_the_memory_of_two_chunks_and_of_the_returned_logits():
    chunk_of_logits = 2 * 64 * 61 * 4
    short, long = peak_bytes(2), peak_bytes(50)
    assert long <= short + 2 * 48 * chunk_of_logits  # once in chunks, once concatenated
