"""The law of streaming for every family and both encodings, in float64 against the step-by-step reference.

The law allows 1e-9 standard deviations of the logits.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from streamllm.cache import SinkCache
from streamllm.models import falcon, gpt_neox, llama, mpt
from streamllm.models.alibi import Alibi
from streamllm.models.rotary import Rope
from tests.laws.scenarios import ROPES, TOLERANCE, VOCABULARY, Rows, cuts, defined, error, feed, loud, text

SIZES = {"vocab_size": VOCABULARY, "width": 32, "mlp_width": 48, "layers": 3, "head_dim": 8, "norm_eps": 1e-5}
LLAMA = llama.Config(
    **SIZES, heads=4, kv_heads=2, rope=ROPES["default"], trained_length=10**6, activation="silu",
    attention_bias=True, mlp_bias=False, tied=False,
)  # fmt: skip
NEOX = gpt_neox.Config(
    **SIZES, heads=4, rope=ROPES["partial"], trained_length=10**6, activation="gelu", attention_bias=True,
    parallel=True, tied=False,
)  # fmt: skip
FALCON = falcon.Config(
    **SIZES, heads=4, kv_heads=1, position=ROPES["default"], trained_length=None, activation="gelu",
    bias=False, parallel=True, shared_norm=True, tied=True,
)  # fmt: skip
MPT = mpt.Config(
    **SIZES, heads=4, alibi=Alibi(4), trained_length=10**6, activation="gelu", clip_qkv=None,
    softmax_scale=8**-0.5, tied=True,
)  # fmt: skip

CONFIGS = {
    "gpt_neox": NEOX,
    "gpt_neox, sequential": replace(NEOX, parallel=False, attention_bias=False),
    "gpt_neox, odd rotary width": replace(NEOX, rope=Rope(10000.0, 5)),
    "gpt_neox, dynamic": replace(NEOX, rope=ROPES["dynamic"]),
    "falcon 7b": FALCON,
    "falcon 40b": replace(FALCON, kv_heads=2, shared_norm=False),
    "falcon 11b": replace(FALCON, kv_heads=2, tied=False, position=ROPES["fast"]),
    "falcon rw": replace(FALCON, kv_heads=4, position=Alibi(4), bias=True, parallel=False, shared_norm=False),
    "falcon rw, 6 heads": replace(
        FALCON, width=48, heads=6, kv_heads=6, position=Alibi(6), parallel=False, shared_norm=False
    ),
    "falcon, parallel and alibi": replace(FALCON, kv_heads=2, position=Alibi(4)),
    "mpt": MPT,
    "mpt storywriter": replace(MPT, alibi=Alibi(4, bias_max=16.0), clip_qkv=0.8),
    "mpt, 5 heads": replace(MPT, width=40, heads=5, alibi=Alibi(5), softmax_scale=0.6, tied=False),
    "mistral": replace(LLAMA, attention_bias=False, windows=(7,) * 3),
    "qwen2": replace(LLAMA, output_bias=False),
    "qwen2, upper layers slide": replace(LLAMA, output_bias=False, windows=(None, 7, 7)),
    "qwen2, three windows": replace(LLAMA, output_bias=False, windows=(3, None, 12)),
    "qwen3": replace(LLAMA, attention_bias=False, head_norms=True),
    "qwen3, dynamic and sliding": replace(
        LLAMA, head_norms=True, windows=(None, 5, 9), rope=ROPES["dynamic"]
    ),
}
MODELS = {llama.Config: llama, gpt_neox.Config: gpt_neox, falcon.Config: falcon, mpt.Config: mpt}
SPANS = [(4, 9), (0, 5), (1, 1), (8, 30)]


@cache
def tiny(name: str, **changes: object) -> nn.Module:
    config = replace(CONFIGS[name], **changes)
    return loud(MODELS[type(config)].Model(config))


every_family = pytest.mark.parametrize("name", CONFIGS)


@every_family
@pytest.mark.parametrize(("sinks", "window"), SPANS)
def test_any_split_is_the_definition(name, sinks, window):
    model, tokens = tiny(name), text(60)
    wanted = defined(model, tokens, sinks, window)
    for parts in (None, [60], cuts(60, seed=1), cuts(60, seed=2, longest=40)):
        assert error(feed(model, SinkCache(model, sinks, window), tokens, parts), wanted) <= TOLERANCE


@every_family
def test_a_small_chunk_is_the_definition(name):
    model, tokens = tiny(name), text(60)
    got = model(tokens, SinkCache(model, 4, 9, chunk=7))
    assert error(got, defined(model, tokens, 4, 9)) <= TOLERANCE


@every_family
@pytest.mark.parametrize("origin", [1000, 10**9])
def test_the_place_in_the_text_does_not_matter(name, origin):
    model, tokens = tiny(name), text(50)
    wanted = defined(model, tokens, 4, 9)
    for parts in (None, cuts(50, seed=3)):
        got = feed(model, SinkCache(model, 4, 9, origin=origin), tokens, parts)
        assert error(got, wanted) <= TOLERANCE


@every_family
def test_a_batch_row_is_that_stream_alone(name):
    rows = Rows(tiny(name), SinkCache(tiny(name), 3, 6, 3, chunk=8))
    for seed, lengths in enumerate([[9, 2, 0], [1, 1, 1], [5, 14, 3], [1, 0, 1], [1, 1, 1]]):
        rows.feed(text(max(lengths), 3, seed=seed), lengths)
    worst = rows.error()
    rows.restart([1])
    for seed in range(4):
        rows.feed(text(1, 3, seed=10 + seed))
    assert max(worst, rows.error()) <= TOLERANCE


@every_family
def test_a_cache_that_never_evicts_is_dense(name):
    model, tokens = tiny(name), text(40)
    dense = model(tokens)
    got = feed(model, SinkCache(model, 0, 40), tokens, cuts(40, seed=4))
    assert error(got, dense) <= TOLERANCE


@every_family
def test_only_the_own_heads_are_cached(name):
    model = tiny(name)
    windows = [6 if own is None else min(own, 6) for own in model.geometry.windows]
    kv_heads = getattr(model.config, "kv_heads", model.config.heads)
    assert SinkCache(model, 2, 6).nbytes == sum(2 * kv_heads * (2 + window) * 8 * 8 for window in windows)


ALIBI = ["falcon rw", "falcon rw, 6 heads", "falcon, parallel and alibi"]


@pytest.mark.parametrize("name", ALIBI)
@pytest.mark.parametrize(("sinks", "window"), SPANS)
def test_rounded_ranks_do_not_depend_on_the_split_either(name, sinks, window):
    """transformers' ALiBi of Falcon, in bfloat16, by the place of a key among those that are seen."""
    model, tokens = tiny(name, position=Alibi(CONFIGS[name].heads, bfloat16_ranks=True)), text(60)
    one_by_one = feed(model, SinkCache(model, sinks, window), tokens)
    for parts in ([60], cuts(60, seed=1), cuts(60, seed=2, longest=40)):
        assert error(feed(model, SinkCache(model, sinks, window), tokens, parts), one_by_one) <= TOLERANCE
    away = feed(model, SinkCache(model, sinks, window, origin=10**9), tokens, cuts(60, seed=5))
    assert error(away, one_by_one) <= TOLERANCE
    assert error(feed(model, SinkCache(model, 0, 60), tokens), model(tokens)) <= TOLERANCE


def test_slopes_are_those_of_the_paper():
    assert Alibi(8).slopes().tolist() == [2.0**-i for i in range(1, 9)]
    assert torch.equal(Alibi(16).slopes(), torch.tensor([2 ** (-i / 2) for i in range(1, 17)]))
    twelve = [2.0**-i for i in range(1, 9)] + [2 ** (-i / 2) for i in (1, 3, 5, 7)]
    assert torch.equal(Alibi(12).slopes(), torch.tensor(twelve))
    assert Alibi(1).slopes().tolist() == [2.0**-8]
    assert Alibi(4, bias_max=16.0).slopes().tolist() == [2.0**-4, 2.0**-8, 2.0**-12, 2.0**-16]
