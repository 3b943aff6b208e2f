"""Chunks of a prompt with fused kernels, against the model's own forward, by Triton's interpreter."""

from __future__ import annotations

import copy

import pytest
import torch

import streamllm
from streamllm.cache import SinkCache
from streamllm.models.linear import quantize
from tests.laws.families import CONFIGS
from tests.laws.scenarios import error, random_tokens
from tests.triton_interpreter import mutant
from tests.unit.test_triton_steps import build, interpreted  # noqa: F401  # a fixture

triton_chunk = pytest.importorskip("streamllm.compiled.triton_chunk")
TOLERANCE = 1e-5  # of the standard deviation


def worst_error(model, sinks=2, window=9, rows=1, usable=True, ragged=False) -> float:
    """Chunks of several lengths before and after the window is full, with single tokens between."""
    compiled = streamllm.compile(copy.deepcopy(model), "cudagraphs")
    caches = [SinkCache(one, sinks, window, rows) for one in (model, compiled)]
    worst = 0.0
    for seed, length in enumerate((6, 5, 1, 3, 30, 2, 1)):
        tokens = random_tokens(length, rows, seed=seed)
        lengths = [max(0, length - row) for row in range(rows)] if ragged else None
        wanted, got = (
            one(tokens, cache, lengths=lengths) for one, cache in zip((model, compiled), caches, strict=True)
        )
        for row in range(rows):
            real = length if lengths is None else lengths[row]
            if real:
                worst = max(worst, error(got[row, :real], wanted[row, :real]))
    assert compiled._chunks is not None
    assert compiled._chunks.usable == usable
    assert (compiled._chunks._function is not None) == usable
    assert compiled.recordings == (0 if ragged else 1)  # of single tokens: a chunk moves no weights
    return worst


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_equals_the_model(name) -> None:
    alibi = build(name).geometry.rope is None  # then the model computes by itself
    assert worst_error(build(name), usable=not alibi) <= TOLERANCE


@pytest.mark.parametrize("ragged", [False, True])
def test_several_rows_equal_the_model(ragged) -> None:
    assert worst_error(build("llama"), rows=3, ragged=ragged) <= TOLERANCE


def test_int8_weights_take_the_models_own_way() -> None:
    model = build("llama")
    quantize(model)
    assert worst_error(model, usable=False) <= TOLERANCE


def test_a_kernel_that_fails_leaves_the_model(monkeypatch) -> None:
    monkeypatch.setattr("streamllm.compiled.triton_support.warn", lambda problem: None)
    monkeypatch.setattr(triton_chunk, "rotated", lambda *_: 1 / 0)
    model = build("llama")
    compiled = streamllm.compile(copy.deepcopy(model), "cudagraphs")
    caches = [SinkCache(one, 2, 5) for one in (model, compiled)]
    for seed in range(2):
        tokens = random_tokens(9, seed=seed)
        assert error(compiled(tokens, caches[1]), model(tokens, caches[0])) <= TOLERANCE
    assert not compiled._chunks.usable


def sinks_error(sinks: int, place: int, first: int, heads: int = 6, groups: int = 2, dim: int = 20) -> float:
    """Of `with_sinks`, against one softmax over all scores."""
    torch.manual_seed(sinks)
    length, keys, scale = 9, 30, 0.3
    query, far = (torch.randn(2, heads, length, dim) for _ in range(2))
    key, value = (torch.randn(2, groups, sinks + keys, dim) for _ in range(2))
    wide_key, wide_value = (x.repeat_interleave(heads // groups, 1) for x in (key, value))
    run_scores = query @ wide_key[:, :, sinks:].transpose(2, 3) * scale
    run_scores[:, :, :first] = -torch.inf
    hidden = torch.arange(sinks) > place + torch.arange(length)[:, None]
    sink_scores = (far @ wide_key[:, :, :sinks].transpose(2, 3) * scale).masked_fill(hidden, -torch.inf)
    wanted = torch.cat((sink_scores, run_scores), 3).softmax(-1) @ wide_value
    run = run_scores[:, :, first:].softmax(-1) @ wide_value[:, :, sinks:]
    got = triton_chunk.with_sinks(
        far, key[:, :, :sinks], value[:, :, :sinks], run, run_scores[:, :, first:].logsumexp(-1), place, scale
    )
    return error(got, wanted)


@pytest.mark.parametrize(
    ("sinks", "place", "first"), [(1, 50, 0), (4, 50, 0), (4, 0, 4), (4, 2, 2), (40, 70, 0)]
)
def test_sinks_join_what_was_read(sinks, place, first) -> None:
    assert sinks_error(sinks, place, first) <= TOLERANCE


def test_sinks_join_for_one_key_head() -> None:
    assert sinks_error(4, 50, 0, heads=5, groups=1) <= TOLERANCE


MUTATIONS = {
    "sinks behind the query are seen": ("(sink[None, :] <= (place + token)[:, None])", "(sink[None, :] >= 0)"),
    "the run is dropped": ("best = log_sum\n", 'best = log_sum - float("inf")\n'),
    "a key head reads another's sinks": ("g * key_head", "0 * key_head"),
    "the rotation has no sine": ("s = tl.load(sin", "s = 0.0 * tl.load(sin"),
    "keys of sinks keep the first rotation": ("value * c + other * s).to(out.dtype.element_ty), mask=whole)\n    if",
                                              "value).to(out.dtype.element_ty), mask=whole)\n    if"),
}  # fmt: skip


@pytest.mark.parametrize("fault", MUTATIONS)
def test_a_fault_in_a_kernel_is_seen(fault, monkeypatch, tmp_path) -> None:
    before, after = MUTATIONS[fault]
    faulty = mutant(tmp_path, triton_chunk.triton_chunk_kernels, before, after)
    assert faulty is not None
    monkeypatch.setattr(triton_chunk, "triton_chunk_kernels", faulty)
    found = max(sinks_error(4, 0, 4), sinks_error(4, 50, 0), worst_error(build("llama")))
    assert not found <= 100 * TOLERANCE
