"""Memory does not grow with the variety of lengths, windows and recordings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import streamllm
from streamllm.cache import SinkCache
from streamllm.compiled import api, library
from streamllm.lru import LRU
from tests.laws.scenarios import random_tokens, tiny_llama

TOOL = Path(__file__).parents[2] / "tools" / "variety.py"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from /proc")
@pytest.mark.parametrize("what", ["dense", "prompts", "windows"])
def test_many_lengths_and_windows_keep_at_most_40_mb(what):
    command = [
        sys.executable,
        str(TOOL),
        "--here",
        "--measure",
        what,
        "--dtype",
        "bfloat16",
        "--lengths",
        "400",
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(run.stdout) <= 40


def test_the_least_recently_used_value_goes_first():
    values: LRU[str, int] = LRU(2)
    values.put("a", 1)
    values.put("b", 2)
    assert values.get("a") == 1
    values.put("c", 3)
    assert (values.get("a"), values.get("b"), values.get("c"), len(values)) == (1, None, 3, 2)


def test_recordings_are_dropped_but_not_those_of_a_living_cache():
    model, tokens = streamllm.compile(tiny_llama(dtype=torch.float32), "flat"), random_tokens(1)
    first = SinkCache(model, 1, 4)
    model(tokens, first)
    for window in range(5, 5 + 2 * api.MAX_RECORDINGS):
        model(tokens, SinkCache(model, 1, window))
    assert len(model._recorded) <= api.MAX_RECORDINGS
    before = model.recordings
    model(tokens, first)
    assert model.recordings == before


def test_a_recording_leaves_nothing_with_fx():
    kept = torch.fx.graph_module._loader.eval_cache
    model, tokens = streamllm.compile(tiny_llama(dtype=torch.float32), "flat"), random_tokens(1)
    before = len(kept)
    for window in range(4, 8):
        model(tokens, SinkCache(model, 1, window))
    assert model.recordings == 4
    assert len(kept) == before


def test_a_bias_that_changes_reaches_the_recording():
    model = tiny_llama(dtype=torch.float32, heads=4, kv_heads=4, layers=1)
    flat, tokens = streamllm.compile(model, "flat"), random_tokens(1)
    flat(tokens, SinkCache(model, 1, 4))
    bias = model.layers[0].attention.v.bias
    try:
        bias.add_(1.0)
        wanted = model(tokens, SinkCache(model, 1, 4))
        torch.testing.assert_close(flat(tokens, SinkCache(model, 1, 4)), wanted)
    finally:
        bias.sub_(1.0)


def test_the_oldest_libraries_on_disk_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "MAX_KEPT_LIBRARIES", 3)
    for number in range(5):
        folder = tmp_path / f"{number:032x}"
        folder.mkdir()
        os.utime(folder, (number, number))
    (tmp_path / "something else").mkdir()
    library._drop_oldest(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"{n:032x}" for n in (2, 3, 4)),
        "something else",
    ]
