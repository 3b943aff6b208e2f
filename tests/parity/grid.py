"""The checkpoints that are compared with transformers: real ones in miniature, and each key by itself."""

from __future__ import annotations

from dataclasses import fields

import torch

from tests.checkpoints import NULL, Tensors, Variant

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


FALCON = {
    "model_type": "falcon",
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
FALCON_40B = {
    **FALCON,
    "num_attention_heads": 8,
    "num_kv_heads": 2,
    "new_decoder_architecture": True,
}
FALCON_RW = {
    **FALCON,
    "num_attention_heads": 8,
    "alibi": True,
    "bias": True,
    "multi_query": False,
    "parallel_attn": False,
}

MPT = {
    "model_type": "mpt",
    "vocab_size": 160,
    "d_model": 64,
    "n_heads": 8,
    "n_layers": 3,
    "max_seq_len": 600,
}


MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 40}
QWEN2 = {**LLAMA, "model_type": "qwen2", "rope_theta": 1000000.0, "rms_norm_eps": 1e-6}
QWEN3 = {**QWEN2, "model_type": "qwen3", "head_dim": 24}


def _variant(base: dict[str, object], rope: dict[str, object] | None = None, /, **changes: object) -> Variant:
    options = {key: changes.pop(key) for key in OPTIONS if key in changes}
    config = {**base, **changes, **({"rope_scaling": rope} if rope else {})}
    return Variant(config=config, **options)


OPTIONS = {field.name for field in fields(Variant)} - {"config"}


def _llama(name: str, rope: dict[str, object] | None = None, **changes: object) -> Variant:
    return _variant(LLAMA, rope, name=f"llama-{name}", **changes)


def _neox(name: str, rope: dict[str, object] | None = None, **changes: object) -> Variant:
    return _variant(NEOX, rope, name=f"gpt_neox-{name}", **changes)


def _falcon(
    base: dict[str, object], name: str, rope: dict[str, object] | None = None, **changes: object
) -> Variant:
    return _variant(base, rope, name=f"falcon-{name}", **changes)


def _mpt(name: str, attention: dict[str, object] | None = None, **changes: object) -> Variant:
    return _variant(MPT, None, name=f"mpt-{name}", attn_config=attention or {}, **changes)


def _llama_like(
    base: dict[str, object], name: str, rope: dict[str, object] | None = None, **changes: object
) -> Variant:
    return _variant(base, rope, name=f"{base['model_type']}-{name}", **changes)


def _inv_freq(tensors: Tensors) -> Tensors:
    wrong = torch.full((8,), 0.5)  # a stored table must be ignored
    return {**tensors, **{f"model.layers.{n}.self_attn.rotary_emb.inv_freq": wrong.clone() for n in range(3)}}


def _only_head(tensors: Tensors) -> Tensors:
    embedding = tensors.pop("model.embed_tokens.weight")
    return {**tensors, "lm_head.weight": embedding}


def _copied_head(tensors: Tensors) -> Tensors:
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def _base_model(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def _neox_unused_tensors(tensors: Tensors) -> Tensors:
    unused = {
        "attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "attention.masked_bias": torch.tensor(-1e9).half(),
        "attention.rotary_emb.inv_freq": torch.full((2,), 0.5),
    }
    return {
        **tensors,
        **{
            f"gpt_neox.layers.{n}.{name}": tensor.clone() for n in range(3) for name, tensor in unused.items()
        },
    }


def _neox_head_as_in_memory(tensors: Tensors) -> Tensors:
    return {name.replace("embed_out", "lm_head"): tensor for name, tensor in tensors.items()}


_NEOX_OLD = {"rope_parameters": None, "rotary_pct": 0.25, "rotary_emb_base": 10000}

_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + 0.9 * i for i in range(8)],
}


def _falcon_copied_head(tensors: Tensors) -> Tensors:
    return {**tensors, "lm_head.weight": tensors["transformer.word_embeddings.weight"].clone()}


# config.json as it was before transformers supported Falcon: its keys, and None for keys that it lacked.
_REFINED_WEB = {
    "num_hidden_layers": None, "num_attention_heads": None, "num_kv_heads": None, "n_layer": 3, "n_head": 8,
    "new_decoder_architecture": None, "ffn_hidden_size": None, "activation": None, "rope_parameters": None,
    "num_ln_in_parallel_attn": None, "tie_word_embeddings": None, "max_position_embeddings": None,
}  # fmt: skip

# config.json as MosaicML wrote it.
_MOSAIC = {
    "layer_norm_epsilon": None, "tie_word_embeddings": None, "learned_pos_emb": True, "no_bias": True,
    "expansion_ratio": 4, "logit_scale": NULL, "norm_type": "low_precision_layernorm", "verbose": 0,
    "init_config": {"name": "kaiming_normal_", "verbose": 0},
}  # fmt: skip
_MOSAIC_ATTENTION = {
    "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0,
    "attn_type": "multihead_attention", "attn_uses_sequence_id": False, "clip_qkv": None, "prefix_lm": False,
    "qk_ln": False, "softmax_scale": None,
}  # fmt: skip

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
    _llama("rope-in-three-places", spell={
        "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 500.0},
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 600.0}, "rope_theta": 700.0}),
    _llama("rope-theta-outside", spell={
        "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None, "rope_theta": 700.0}),
    _llama("rope-of-two-types", spell={
        "rope_scaling": {"type": "dynamic", "rope_type": "linear", "factor": 2.0}, "rope_parameters": None}),
    _llama("rope-of-two-originals", spell={
        "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 512,
                            "rope_theta": 10000.0},
        "original_max_position_embeddings": 64}),
    _llama("sharded", shards="60KB"),
    _llama("float16", dtype=torch.float16),
    _llama("bfloat16-sharded", dtype=torch.bfloat16, shards="40KB"),
    _neox("pythia", dtype=torch.float16, tensors=_neox_unused_tensors, hidden_size=128, num_attention_heads=8,
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
    _falcon(FALCON, "7b"),
    _falcon(FALCON, "7b-old", num_attention_heads=8, max_position_embeddings=2048,
            tensors=_falcon_copied_head, dtype=torch.bfloat16, shards=None,
            disguise={**_REFINED_WEB, "model_type": "RefinedWebModel", "multi_query": True}),
    _falcon(FALCON, "7b-sequential", parallel_attn=False),
    _falcon(FALCON, "7b-biased", bias=True, ffn_hidden_size=100),
    _falcon(FALCON, "separate-heads", multi_query=False),
    _falcon(FALCON, "n-embed", spell={"hidden_size": 32, "n_embed": 64}),
    _falcon(FALCON, "relu", activation="relu"),
    _falcon(FALCON, "eps", layer_norm_epsilon=0.1),
    _falcon(FALCON, "linear", {"type": "linear", "factor": 4.0}),
    _falcon(FALCON, "dynamic-grown", {"type": "dynamic", "factor": 2.0}, max_position_embeddings=256),
    _falcon(FALCON_40B, "40b", shards="80KB"),
    _falcon(FALCON_40B, "40b-old", max_position_embeddings=2048,
            disguise={**_REFINED_WEB, "model_type": "RefinedWeb", "n_head_kv": 2}),
    _falcon(FALCON_40B, "40b-mixed",
            disguise={"n_head": 8, "n_layer": 3, "n_head_kv": 2, "num_kv_heads": None,
                      "num_hidden_layers": None, "num_attention_heads": None}),
    _falcon(FALCON_40B, "40b-wizard", vocab_size=161, multi_query=False, max_position_embeddings=2048,
            disguise={**_REFINED_WEB, "model_type": "RefinedWeb", "n_head_kv": 2}),
    _falcon(FALCON_40B, "40b-biased", bias=True, dtype=torch.float16),
    _falcon(FALCON_40B, "40b-yarn", {"rope_type": "yarn", "factor": 4.0,
                                     "original_max_position_embeddings": 256}),
    _falcon(FALCON_40B, "40b-alibi", alibi=True),
    _falcon(FALCON_40B, "11b", num_ln_in_parallel_attn=1, tie_word_embeddings=False, rope_theta=500042.0,
            ffn_hidden_size=256),
    _falcon(FALCON_RW, "rw-1b"),
    _falcon(FALCON_RW, "rw-old", disguise={**_REFINED_WEB, "model_type": "RefinedWebModel"}),
    _falcon(FALCON_RW, "rw-12-heads", hidden_size=96, num_attention_heads=12, faulty=True),
    _falcon(FALCON_RW, "rw-5-heads", hidden_size=80, num_attention_heads=5, faulty=True),
    _falcon(FALCON_RW, "rw-parallel", parallel_attn=True),
    _falcon(FALCON_RW, "rw-one-key-head", multi_query=True, bias=False),
    _mpt("7b", _MOSAIC_ATTENTION, spell=_MOSAIC),
    _mpt("7b-chat-bfloat16", _MOSAIC_ATTENTION, spell=_MOSAIC, dtype=torch.bfloat16, shards="60KB"),
    _mpt("clipped", {"clip_qkv": 1.5}),
    _mpt("storywriter", {"clip_qkv": 6.0, "alibi_bias_max": 16}, faulty=True),
    _mpt("softmax-scale", {"softmax_scale": 0.4}),
    _mpt("12-heads", d_model=96, n_heads=12),
    _mpt("5-heads", d_model=80, n_heads=5),
    _mpt("one-head", d_model=32, n_heads=1),
    _mpt("untied", tie_word_embeddings=False),
    _mpt("eps", layer_norm_epsilon=0.1, dtype=torch.float16),
    _mpt("without-attn-config", spell={"attn_config": None}),
    _mpt("no-alibi", {"alibi": False}, refused="alibi is False; supported: True"),
    _mpt("all-ignored-keys", {"alibi_bias_max": 4, "qk_ln": True, "prefix_lm": True},
         spell={"no_bias": False, "expansion_ratio": 2, "logit_scale": 0.5}, refused="no_bias is False"),
    _llama_like(MISTRAL, "v0.1", spell={"rope_parameters": None, "rope_theta": 10000.0, "head_dim": None}),
    _llama_like(MISTRAL, "v0.3", sliding_window=None, rope_theta=1000000.0, spell={"sliding_window": NULL}),
    _llama_like(MISTRAL, "nemo", sliding_window=None, head_dim=24, spell={"sliding_window": NULL}, shards="60KB",
                strays=("consolidated.safetensors",)),
    _llama_like(MISTRAL, "window-of-1", sliding_window=1),
    _llama_like(MISTRAL, "kv-heads-absent", num_attention_heads=16, num_key_value_heads=8, head_dim=4,
                spell={"num_key_value_heads": None}),
    _llama_like(MISTRAL, "kv-heads-null", num_attention_heads=4, num_key_value_heads=4,
                disguise={"num_key_value_heads": NULL}),  # transformers reads null but its check refuses it
    _llama_like(MISTRAL, "window-absent", sliding_window=4096, spell={"sliding_window": None}),
    _llama_like(MISTRAL, "key-of-llama", spell={"attention_bias": True}),
    _llama_like(MISTRAL, "bfloat16", dtype=torch.bfloat16),
    _llama_like(QWEN2, "0.5b", tie_word_embeddings=True, num_attention_heads=6, hidden_size=48,
                spell={"rope_parameters": None, "rope_theta": 1000000.0, "layer_types": None, "sliding_window": 32,
                       "max_window_layers": 1, "use_sliding_window": False}),
    _llama_like(QWEN2, "7b-bfloat16", dtype=torch.bfloat16, shards="60KB"),
    _llama_like(QWEN2, "upper-layers-slide", use_sliding_window=True, sliding_window=40, max_window_layers=1,
                spell={"layer_types": None}),
    _llama_like(QWEN2, "layer-types", use_sliding_window=True, sliding_window=40,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    _llama_like(QWEN2, "head-dim", head_dim=24),
    _llama_like(QWEN2, "key-of-llama", spell={"attention_bias": False}),
    _llama_like(QWEN2, "kv-heads-absent", num_attention_heads=64, num_key_value_heads=32, head_dim=4,
                spell={"num_key_value_heads": None}),
    _llama_like(QWEN2, "yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}),
    _llama_like(QWEN3, "8b", spell={"layer_types": None}),
    _llama_like(QWEN3, "0.6b", tie_word_embeddings=True, dtype=torch.bfloat16),
    _llama_like(QWEN3, "head-dim-absent", head_dim=128, spell={"head_dim": None}, num_hidden_layers=2),
    _llama_like(QWEN3, "biased", attention_bias=True),
    _llama_like(QWEN3, "slides", use_sliding_window=True, sliding_window=40, max_window_layers=2,
                spell={"layer_types": None}),
]  # fmt: skip
