"""The checkpoints that are compared with transformers."""

from __future__ import annotations

from dataclasses import fields

import torch

from tests.checkpoints import Tensors, Variant

LLAMA = {
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
}


def _variant(base: dict[str, object], rope: dict[str, object] | None = None, /, **changes: object) -> Variant:
    options = {key: changes.pop(key) for key in OPTIONS if key in changes}
    config = {**base, **changes, **({"rope_scaling": rope} if rope else {})}
    return Variant(config=config, **options)


OPTIONS = {field.name for field in fields(Variant)} - {"config"}


def _llama(name: str, rope: dict[str, object] | None = None, **changes: object) -> Variant:
    return _variant(LLAMA, rope, name=f"llama-{name}", **changes)


def _neox(name: str, rope: dict[str, object] | None = None, **changes: object) -> Variant:
    return _variant(NEOX, rope, name=f"gpt_neox-{name}", **changes)


def _inv_freq(tensors: Tensors) -> Tensors:
    wrong = torch.full((8,), 0.5)  # a stored table must not be used
    return {**tensors, **{f"model.layers.{n}.self_attn.rotary_emb.inv_freq": wrong.clone() for n in range(3)}}


def _only_head(tensors: Tensors) -> Tensors:
    embedding = tensors.pop("model.embed_tokens.weight")
    return {**tensors, "lm_head.weight": embedding}


def _copied_head(tensors: Tensors) -> Tensors:
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def _base_model(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def _neox_junk(tensors: Tensors) -> Tensors:
    junk = {
        "attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "attention.masked_bias": torch.tensor(-1e9).half(),
        "attention.rotary_emb.inv_freq": torch.full((2,), 0.5),
    }
    return {
        **tensors,
        **{f"gpt_neox.layers.{n}.{name}": tensor.clone() for n in range(3) for name, tensor in junk.items()},
    }


def _neox_head_as_in_memory(tensors: Tensors) -> Tensors:
    return {name.replace("embed_out", "lm_head"): tensor for name, tensor in tensors.items()}


_NEOX_OLD = {"rope_parameters": None, "rotary_pct": 0.25, "rotary_emb_base": 10000}

_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + 0.9 * i for i in range(8)],
}

VARIANTS = [
    _llama("gqa"),
    _llama("mha", num_key_value_heads=4),
    _llama("mqa", num_key_value_heads=1),
    _llama("old-file", spell={"num_key_value_heads": None, "rope_parameters": None, "pretraining_tp": 2,
                              "dtype": None, "torch_dtype": "float32", "pad_token_id": -1},
           num_key_value_heads=4, tensors=_inv_freq),
    _llama("tied", tie_word_embeddings=True),
    _llama("tied-copy", tie_word_embeddings=True, tensors=_copied_head),
    _llama("tied-head-only", tie_word_embeddings=True, tensors=_only_head),
    _llama("base-model", tie_word_embeddings=True, tensors=_base_model),
    _llama("biased", attention_bias=True, mlp_bias=True),
    _llama("attention-bias", attention_bias=True),
    _llama("mlp-bias", mlp_bias=True),
    _llama("wide-head", head_dim=24),
    _llama("narrow-head", head_dim=6, num_key_value_heads=4),
    _llama("code", vocab_size=167, rope_theta=1000000),
    _llama("eps", rms_norm_eps=0.1),
    _llama("relu", hidden_act="relu"),
    _llama("gelu", hidden_act="gelu"),
    _llama("gelu-tanh", hidden_act="gelu_pytorch_tanh"),
    _llama("linear", {"type": "linear", "factor": 4.0}),
    _llama("scaling-without-type", spell={"rope_scaling": {"factor": 2.0}, "rope_theta": 10000.0,
                                          "rope_parameters": None}),
    _llama("dynamic-grown", {"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=256),
    _llama("dynamic-plain", {"rope_type": "dynamic", "factor": 2.0}),
    _llama("llama3", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 128}, rope_theta=500000.0),
    _llama("yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256,
                    "finetuned": True}),
    _llama("yarn-mscale", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256,
                           "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 16, "beta_slow": 2,
                           "truncate": False}),
    _llama("yarn-given", {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.8}),
    _llama("longrope-short", {**_LONGROPE, "factor": 4.0}, original_max_position_embeddings=700),
    _llama("longrope-long", _LONGROPE, original_max_position_embeddings=256),
    _llama("sharded", shards="60KB"),
    _llama("float16", dtype=torch.float16),
    _llama("bfloat16-sharded", dtype=torch.bfloat16, shards="40KB"),
    _neox("pythia", dtype=torch.float16, tensors=_neox_junk, hidden_size=128, num_attention_heads=8,
          spell={**_NEOX_OLD, "dtype": None, "torch_dtype": "float16", "use_parallel_residual": True}),
    _neox("20b", hidden_act="gelu_fast", shards="100KB",
          spell={**_NEOX_OLD, "use_parallel_residual": None, "attention_bias": None, "eos_token_id": 2}),
    _neox("redpajama", rotary_pct=1.0, use_parallel_residual=False,
          spell={**_NEOX_OLD, "rotary_pct": 1.0}),
    _neox("sequential", use_parallel_residual=False),
    _neox("odd-rotary", hidden_size=80, rotary_pct=0.25),
    _neox("full-head-but-one", rotary_pct=0.9375),
    _neox("no-attention-bias", attention_bias=False),
    _neox("tied", tie_word_embeddings=True),
    _neox("head-as-in-memory", tensors=_neox_head_as_in_memory),
    _neox("gelu-new", hidden_act="gelu_new"),
    _neox("gelu-tanh", hidden_act="gelu_pytorch_tanh"),
    _neox("eps", layer_norm_eps=0.1),
    _neox("other-families-keys", rotary_emb_base=500.0,
          spell={"rope_parameters": None, "rotary_emb_base": 500.0, "rope_theta": 77.0,
                 "partial_rotary_factor": 0.5}),
    _neox("quarter-by-default", spell={"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}),
    _neox("linear", {"type": "linear", "factor": 4.0}, rotary_pct=0.5),
    _neox("dynamic-grown", {"type": "dynamic", "factor": 2.0}, max_position_embeddings=256, rotary_pct=0.5),
    _neox("yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
          rotary_pct=0.5),
    _neox("bfloat16-sharded", dtype=torch.bfloat16, shards="60KB"),
]  # fmt: skip
