"""Tiny models of every family, with each of its variants."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from torch import nn

from streamllm.models import falcon, gpt_neox, llama, mpt
from streamllm.models.alibi import Alibi
from streamllm.models.rotary import Rope
from tests.laws.scenarios import ROPES, VOCABULARY, randomize

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


@cache
def tiny_model(name: str, **changes: object) -> nn.Module:
    """A model of CONFIGS with large random weights in float64."""
    config = replace(CONFIGS[name], **changes)
    return randomize(MODELS[type(config)].Model(config))
