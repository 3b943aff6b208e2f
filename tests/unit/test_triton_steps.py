"""Decoding steps rewritten into Triton kernels, against the model's own forward, by Triton's interpreter."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import streamllm
from streamllm.cache import SinkCache
from streamllm.compiled import api, cuda, triton_support
from streamllm.models.alibi import Alibi
from streamllm.models.linear import quantize
from tests.laws.families import CONFIGS, MODELS
from tests.laws.scenarios import error, random_tokens, randomize, tiny_llama
from tests.triton_interpreter import mutant, triton_launch

TOLERANCE = 1e-5  # of the standard deviation of the logits


@pytest.fixture(autouse=True)
def interpreted(monkeypatch) -> None:
    """Recordings for the backend "cudagraphs" on the CPU, rewritten into Triton kernels; a failing kernel raises."""

    def capture(function, device):
        result = function().clone()
        return lambda: result.copy_(function())

    def fail(problem):
        raise problem

    monkeypatch.setattr(cuda, "capture", capture)
    monkeypatch.setattr(api, "CAPTURABLE", ("cpu",))
    monkeypatch.setattr(triton_support, "DEVICES", ("cpu",))
    monkeypatch.setattr(triton_support, "warn", fail)
    triton_support._works.cache_clear()


def build(name: str, layers: int = 1, **changes: object) -> torch.nn.Module:
    if name == "llama":
        return tiny_llama.__wrapped__(dtype=torch.float32, layers=layers, **changes)
    config = CONFIGS[name]
    if getattr(config, "windows", ()):
        layers, changes = 2, {"windows": config.windows[:2], **changes}
    return randomize(MODELS[type(config)].Model(replace(config, layers=layers, **changes)), torch.float32)


def worst_error(model, sinks, window, rows=1, origin=0, int8_cache=False, ragged=False, fused=True) -> float:
    """Single tokens from the first on, where the window is nearly full, when it is full, and after a chunk."""
    compiled = streamllm.compile(copy.deepcopy(model), "cudagraphs")
    kind = "int8" if int8_cache else None
    caches = [SinkCache(one, sinks, window, rows, origin=origin, quantize=kind) for one in (model, compiled)]
    if ragged:
        lengths = [3 * row % 8 + 1 for row in range(rows)]
        for one, cache in zip((model, compiled), caches, strict=True):
            one(random_tokens(9, rows, seed=5), cache, lengths=lengths)
    parts = [1, 1, max(1, sinks + window - 2), 1, 4, 1]
    worst = 0.0
    for part in random_tokens(sum(parts), rows).split(parts, 1):
        wanted, got = (one(part, cache) for one, cache in zip((model, compiled), caches, strict=True))
        worst = max(worst, error(got, wanted))
    assert compiled._fusable == fused
    assert compiled.recordings == (1 if fused else 2)  # one serves a window that fills and one that is full
    return worst


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_equals_the_model(name) -> None:
    number = list(CONFIGS).index(name)
    sinks, window, rows = [(2, 5, 1), (0, 4, 3), (1, 3, 1), (4, 6, 3)][number % 4]
    assert worst_error(build(name), sinks, window, rows, ragged=number % 3 == 0) <= TOLERANCE


@pytest.mark.parametrize(
    ("sinks", "window", "rows", "origin"),
    [
        (0, 1, 1, 0),
        (1, 1, 3, 0),
        (4, 1, 1, 0),
        (8, 1, 1, 0),
        (8, 3, 3, 10**9),
        (4, 40, 1, 10**9),
        (0, 70, 1, 0),
    ],
)
def test_any_sinks_window_and_origin_equal_the_model(sinks, window, rows, origin) -> None:
    assert worst_error(build("llama"), sinks, window, rows, origin) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen3", "falcon rw", "mpt storywriter"])
def test_rows_at_different_places_equal_the_model(name) -> None:
    assert worst_error(build(name), 4, 9, rows=3, ragged=True) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "falcon rw"])
@pytest.mark.parametrize("rows", [1, 3])
def test_int8_weights_equal_the_model(name, rows) -> None:
    model = build(name)
    quantize(model)
    assert worst_error(model, 2, 5, rows) <= TOLERANCE


@pytest.mark.parametrize(("name", "sinks", "rows"), [("llama", 4, 1), ("falcon rw", 2, 3), ("mpt", 0, 1)])
def test_an_int8_cache_equals_the_model(name, sinks, rows) -> None:
    assert worst_error(build(name), sinks, 5, rows, int8_cache=True, ragged=rows > 1) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "falcon 40b", "falcon rw"])
def test_many_rows_equal_the_model(name, monkeypatch) -> None:
    """Products by cuBLAS, everything else by the kernels."""
    monkeypatch.setattr("streamllm.compiled.triton_tiles.MAX_MATVEC_ROWS", 2)
    assert worst_error(build(name), 2, 5, rows=3) <= TOLERANCE


def test_activations_of_every_kind_equal_the_model() -> None:
    for activation in ("relu", "gelu", "gelu_new", "gelu_fast", "quick_gelu"):
        assert worst_error(build("llama", activation=activation), 1, 3) <= TOLERANCE, activation
    assert worst_error(build("gpt_neox", activation="gelu_fast"), 1, 3) <= TOLERANCE


def test_what_no_kernel_covers_runs_as_recorded() -> None:
    alibi = Alibi(4, bfloat16_ranks=True)
    assert worst_error(build("falcon rw", position=alibi), 2, 5, fused=False) <= TOLERANCE


def test_float64_is_not_rewritten(monkeypatch) -> None:
    monkeypatch.setattr(api.Compiled, "_record_fused", lambda *_: 1 / 0)
    model = streamllm.compile(build("llama").double(), "cudagraphs")
    model(random_tokens(1), SinkCache(model, 2, 5))
    assert model.recordings == 1


def test_float32_angles_are_those_of_the_model() -> None:
    rope = replace(CONFIGS["gpt_neox"].rope, float32_angles=True)
    assert worst_error(build("gpt_neox", rope=rope), 2, 5) <= TOLERANCE


def evicted_error(model, rows=1) -> float:
    """After entries were taken out: the oldest ones, some in the middle, and nearly all."""
    compiled = streamllm.compile(copy.deepcopy(model), "cudagraphs")
    both = [(one, SinkCache(one, 2, 40, rows)) for one in (model, compiled)]
    worst = 0.0
    for seed, (start, stop) in enumerate([(2, 4), (5, 9), (10, 12), (2, 30)]):
        for one, cache in both:
            one(random_tokens(37 if seed else 12, rows, seed=seed), cache)
            cache.evict_range(start, stop, rows=[rows - 1])
        for part in random_tokens(3, rows, seed=seed + 9).split(1, 1):
            wanted, got = (one(part, cache) for one, cache in both)
            worst = max(worst, error(got, wanted))
    assert compiled._fusable
    return worst


@pytest.mark.parametrize("name", ["llama", "mpt", "qwen2, three windows"])
@pytest.mark.parametrize("rows", [1, 3])
def test_streams_with_entries_taken_out_equal_the_model(name, rows) -> None:
    assert evicted_error(build(name), rows) <= TOLERANCE


MUTATIONS = {
    "sinks are scored from the wrong place": ("SINKS), SLOTS - 1)\n    if k", "SINKS), t)\n    if k", "llama"),
    "sinks meet the query of recent keys": ("scored(sink_query,", "scored(query,", "llama"),
    "the new token is missing": ("& (split == 0)\n        best", "& (split < 0)\n        best", "llama"),
    "a split is missing": ("(split < SPLITS)", "(split < SPLITS - 1)", "llama"),
    "a residual is dropped": ("    if RESIDUAL:", "    if RESIDUAL and N < 0:", "llama"),
    "a bias is dropped": ("    if BIAS:", "    if BIAS and N < 0:", "llama"),
    "the new key is stored unrotated": (
        "new_key = rotated(new_key, key_partner, key_cos + turn, key_sin + turn, d, ROTATED)", "pass", "llama",
    ),
    "the clip is dropped": ("    if CLIP:", "    if CLIP and clip < 0:", "mpt storywriter"),
    "ALiBi forgets that sinks travel": ("SLOTS - 1).to(tl.int32)", "t).to(tl.int32)", "mpt"),
    "a layer norm keeps its mean": ("value = (value - mean) * deviation", "value = value * deviation", "mpt"),
    "what was taken out is seen": ("(back <= reach)", "(back <= window)", "llama"),
    "head norms are dropped": ("    if HEAD_NORMS:", "    if HEAD_NORMS and clip < 0:", "qwen3"),
}  # fmt: skip


@pytest.mark.parametrize("fault", MUTATIONS)
def test_a_fault_in_a_kernel_is_seen(fault, monkeypatch, tmp_path) -> None:
    before, after, name = MUTATIONS[fault]
    found = 0
    for module in ("kernels", "triton_attention_kernel"):
        faulty = mutant(tmp_path, getattr(triton_launch, module), before, after)
        if faulty is not None:
            monkeypatch.setattr(triton_launch, module, faulty)
            found += 1
    assert found
    assert max(worst_error(build(name), 4, 40), evicted_error(build(name))) > 100 * TOLERANCE
