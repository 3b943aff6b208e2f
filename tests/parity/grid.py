"""The checkpoints that are compared with transformers."""

from __future__ import annotations

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


def _llama(name: str, rope: dict[str, object] | None = None, **changes: object) -> Variant:
    options = {key: changes.pop(key) for key in ("dtype", "shards", "spell", "tensors") if key in changes}
    config = {**LLAMA, **changes, **({"rope_scaling": rope} if rope else {})}
    return Variant(f"llama-{name}", config, **options)


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
]  # fmt: skip
