"""config.json of each family: defaults of absent keys, values that are refused, and trained lengths."""

from __future__ import annotations

from typing import Any

import pytest

from streamllm.models.alibi import Alibi
from streamllm.weights import MODEL_TYPES, UnsupportedConfig
from streamllm.weights.checkpoint import read_config
from streamllm.weights.config_reader import ConfigReader


def read(model_type: str, match_transformers: bool = False, **keys: Any) -> Any:
    return read_config(ConfigReader({"model_type": model_type, **keys}), match_transformers)[1]


TRANSFORMERS_NAMES = {  # our names -> names in transformers' configs
    "vocab_size": ("vocab_size",),
    "width": ("hidden_size",),
    "mlp_width": ("intermediate_size", "ffn_hidden_size"),
    "layers": ("num_hidden_layers",),
    "heads": ("num_attention_heads",),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "activation": ("hidden_act", "activation"),
    "tied": ("tie_word_embeddings",),
    "trained_length": ("max_position_embeddings", "max_seq_len"),
    "attention_bias": ("attention_bias",),
    "mlp_bias": ("mlp_bias",),
    "bias": ("bias",),
    "parallel": ("parallel_attn", "use_parallel_residual"),
}
KNOWN_TO_TRANSFORMERS = [name for name, row in MODEL_TYPES.items() if row.replaced_by is None]


@pytest.mark.parametrize("model_type", KNOWN_TO_TRANSFORMERS)
def test_absent_keys_have_the_defaults_of_transformers(model_type: str) -> None:
    from transformers import AutoConfig

    theirs, ours = AutoConfig.for_model(model_type), read(model_type)
    compared = 0
    for name, their_names in TRANSFORMERS_NAMES.items():
        for their_name in their_names:
            if hasattr(ours, name) and hasattr(theirs, their_name):
                assert getattr(ours, name) == getattr(theirs, their_name), name
                compared += 1
    assert compared >= 7


@pytest.mark.parametrize(
    ("model_type", "kv_heads", "head_dim"),
    [("llama", 32, 128), ("mistral", 8, 128), ("qwen2", 32, 128), ("qwen3", 32, 128), ("falcon", 1, 64)],
)
def test_default_heads(model_type: str, kv_heads: int, head_dim: int) -> None:
    assert (read(model_type).kv_heads, read(model_type).head_dim) == (kv_heads, head_dim)


def test_absent_and_null_key_heads() -> None:
    for model_type in ("llama", "mistral", "qwen2", "qwen3"):
        config = read(model_type, num_attention_heads=64, num_key_value_heads=None)
        assert config.kv_heads == 64
    assert read("llama", num_attention_heads=64).kv_heads == 64
    assert read("mistral", num_attention_heads=64).kv_heads == 8
    assert read("qwen2", num_attention_heads=64).kv_heads == 32
    assert read("qwen3", num_attention_heads=64).head_dim == 128


def test_default_thetas() -> None:
    for model_type in ("llama", "mistral", "qwen2", "qwen3", "gpt_neox"):
        assert read(model_type).rope.theta == 10000
    assert read("falcon").position.theta == 10000
    assert read("gpt_neox").rope.dim == 24  # a quarter of 96


def test_sliding_windows() -> None:
    two = {"num_hidden_layers": 2}
    assert read("llama", **two, sliding_window=9).windows == ()
    assert read("mistral", **two).windows == (4096, 4096)
    assert read("mistral", **two, sliding_window=None).windows == (None, None)
    assert read("mistral", **two, sliding_window=9, layer_types=["full_attention"] * 2).windows == (9, 9)
    for model_type in ("qwen2", "qwen3"):
        assert read(model_type, **two, sliding_window=131072).windows == (None, None)
        used = {**two, "use_sliding_window": True}
        assert read(model_type, **used).windows == (None, None)  # the window begins at layer 28
        assert read(model_type, **used, max_window_layers=1).windows == (None, 4096)
        assert read(model_type, **used, max_window_layers=0, sliding_window=None).windows == (None, None)
        types = ["sliding_attention", "full_attention"]
        assert read(model_type, **used, layer_types=types, sliding_window=7).windows == (7, None)


OLD_40B = {"n_layer": 60, "n_head": 128, "n_head_kv": 8, "hidden_size": 8192, "parallel_attn": True}
OLD_7B = {"n_layer": 32, "n_head": 71, "hidden_size": 4544, "multi_query": True, "parallel_attn": True}
OLD_RW = {"n_layer": 24, "n_head": 32, "hidden_size": 2048, "multi_query": False, "parallel_attn": False,
          "alibi": True, "bias": True, "vocab_size": 50304}  # fmt: skip


def test_old_keys_of_falcon() -> None:
    large, small, rw = (
        read("RefinedWeb", **OLD_40B),
        read("RefinedWebModel", **OLD_7B),
        read("RefinedWebModel", **OLD_RW),
    )
    assert (large.layers, large.heads, large.kv_heads, large.shared_norm) == (60, 128, 8, False)
    assert (small.layers, small.heads, small.kv_heads, small.shared_norm) == (32, 71, 1, True)
    assert (rw.layers, rw.heads, rw.kv_heads, rw.parallel) == (24, 32, 32, False)
    assert rw.position == Alibi(32)
    assert large == read("falcon", **OLD_40B)
    both = {**OLD_40B, "n_layer": 1, "n_head": 2, "num_hidden_layers": 60, "num_attention_heads": 128}
    assert read("falcon", **both) == large


def test_trained_lengths() -> None:
    assert read("gpt_neox").trained_length == 2048
    assert read("falcon").trained_length == 2048
    assert read("falcon", **OLD_RW).trained_length is None
    assert read("mpt", max_seq_len=8192).trained_length == 8192
    assert read("mistral", max_position_embeddings=32768).trained_length == 32768
    doubled = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert read("gpt_neox", **doubled).trained_length == 4096
    assert read("falcon", **doubled).trained_length == 4096


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("stablelm", {}, "model_type is 'stablelm'; supported: .*gpt_neox, llama, mistral, mpt, qwen2, qwen3"),
    ("gptj", {}, "model_type is 'gptj'; supported: "),
    ("mixtral", {}, "model_type is 'mixtral'; supported: "),
    ("mpt", {"attn_config": {"alibi": False}}, "alibi is False; supported: True"),
    ("mpt", {"attn_config": {"qk_ln": True}}, "qk_ln is True; supported: False"),
    ("mpt", {"attn_config": {"prefix_lm": True}}, "prefix_lm is True"),
    ("mpt", {"attn_config": {"attn_type": "grouped_query_attention"}}, "attn_type is 'grouped_"),
    ("mpt", {"attn_config": {"kv_n_heads": 8}}, "kv_n_heads is 8"),
    ("mpt", {"attn_config": {"rope": True}}, "rope is True"),
    ("mpt", {"attn_config": {"sliding_window_size": 512}}, "sliding_window_size is 512"),
    ("mpt", {"attn_config": {"clip_qkv": -1}}, "clip_qkv is -1"),
    ("mpt", {"attn_config": 3}, "attn_config is 3"),
    ("mpt", {"no_bias": False}, "no_bias is False"),
    ("mpt", {"expansion_ratio": 2}, "expansion_ratio is 2; supported: 4"),
    ("mpt", {"logit_scale": "inv_sqrt_d_model"}, "logit_scale is 'inv_sqrt_d_model'"),
    ("mpt", {"norm_type": "rmsnorm"}, "norm_type is 'rmsnorm'"),
    ("mpt", {"n_heads": 3}, "n_heads is 3; supported: a divisor of d_model, 2048"),
    ("falcon", {**OLD_40B, "parallel_attn": False}, "parallel_attn is False"),
    ("falcon", {**OLD_40B, "n_head_kv": 3}, "num_kv_heads is 3"),
    ("falcon", {**OLD_40B, "num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn is 3"),
    ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn is 2"),
    ("falcon", {"activation": "swiglu"}, "activation is 'swiglu'"),
    ("falcon", {"hidden_size": 71, "num_attention_heads": 71}, "makes the heads even in width"),
    ("gpt_neox", {"rotary_pct": 0.0}, "rotary_pct is 0.0"),
    ("gpt_neox", {"rotary_pct": 2.0}, "rotary_pct is 2.0"),
    ("gpt_neox", {"num_attention_heads": 5}, "num_attention_heads is 5"),
    ("gpt_neox", {"num_attention_heads": 16, "hidden_size": 320, "rope_scaling": {"type": "yarn"}}, "odd"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
    ("qwen2", {"num_hidden_layers": 1, "layer_types": ["chunked_attention"]}, "layer_types"),
    ("qwen2", {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "use_sliding_window"),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
    ("qwen3", {"quantization_config": {"bits": 4}}, "quantised"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "keys", "message"), REFUSED)
def test_unsupported_values_are_named(model_type: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedConfig, match=message):
        read(model_type, **keys)


def test_match_transformers_ignores_the_same_keys() -> None:
    ignored = {
        "alibi": False,
        "alibi_bias_max": 16,
        "qk_ln": True,
        "prefix_lm": True,
        "kv_n_heads": 2,
        "rope": True,
    }
    config = read("mpt", True, no_bias=False, expansion_ratio=2, logit_scale=0.5, attn_config=ignored)
    assert config == read("mpt", True)
    assert read("mpt", attn_config={"alibi_bias_max": 16}).alibi == Alibi(16, bias_max=16)


def test_supported_values_take_effect() -> None:
    config = read("mpt", attn_config={"clip_qkv": 6.0, "softmax_scale": 0.1})
    assert (config.clip_qkv, config.softmax_scale) == (6.0, 0.1)
    assert read("mpt", attn_config={"clip_qkv": None, "softmax_scale": None}).softmax_scale == 128**-0.5
    assert read("falcon", True, alibi=True).position == Alibi(71, bfloat16_ranks=True)
