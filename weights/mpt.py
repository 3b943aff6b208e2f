"""MPT checkpoints: config.json -> Config, names of tensors on disk -> names in models/mpt.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from streamllm.models.alibi import Alibi
from streamllm.models.mpt import Config, Model
from streamllm.weights.config_reader import ConfigReader
from streamllm.weights.family import Family, Fused, Target


def read_config(config: ConfigReader, match_transformers: bool) -> Config:
    """The model's Config. Absent keys have transformers' defaults.

    Keys that transformers ignores are honoured or refused, but ignored with `match_transformers`. MosaicML's
    own code reads an absent `alibi` or `no_bias` as false. Such checkpoints hold position embeddings and
    biases, so they are refused by the names of these tensors.
    """
    attention = config.inner("attn_config") or ConfigReader({}, f"attn_config in {config.where}")
    bias_max = 8.0
    if not match_transformers:
        _check_values(config, SUPPORTED)
        _check_values(attention, SUPPORTED_IN_ATTENTION)
        bias_max = attention.number("alibi_bias_max", 8.0, 0.0, 1000.0)
    width = config.size("d_model", 2048)
    heads = config.size("n_heads", 16)
    if width % heads:
        raise config.wrong("n_heads", heads, f"a divisor of d_model, {width}")
    return Config(
        vocab_size=config.size("vocab_size", 50368),
        width=width,
        mlp_width=4 * width,
        layers=config.depth("n_layers", 24),
        heads=heads,
        head_dim=width // heads,
        alibi=Alibi(heads, bias_max),
        trained_length=config.size("max_seq_len", 2048),
        norm_eps=config.number("layer_norm_epsilon", 1e-5, 0.0),
        activation="gelu",
        clip_qkv=attention.number("clip_qkv", 0.0, 0.0, MOST_IN_HALF) or None,
        softmax_scale=attention.number(
            "softmax_scale", (width // heads) ** -0.5, -MOST_IN_HALF, MOST_IN_HALF
        ),
        tied=config.flag("tie_word_embeddings", True),
    )


MOST_IN_HALF = 65504.0  # the largest number of float16

# The supported values of keys that MosaicML's code reads and transformers ignores. None stands for null.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "no_bias": (True,),
    "expansion_ratio": (4,),
    "logit_scale": (None,),
    "norm_type": ("layernorm", "low_precision_layernorm"),
}
SUPPORTED_IN_ATTENTION: dict[str, tuple[Any, ...]] = {
    "alibi": (True,),  # learned_pos_emb has no effect with it
    "attn_type": ("multihead_attention",),
    "kv_n_heads": (None,),
    "prefix_lm": (False,),
    "qk_ln": (False,),
    "qk_gn": (False,),
    "rope": (False,),
    "sliding_window_size": (-1,),
}


def _check_values(config: ConfigReader, supported: dict[str, tuple[Any, ...]]) -> None:
    for name, values in supported.items():
        value = config.get(name)
        if value is not None and value not in values:
            allowed = " or ".join("null" if value is None else str(value) for value in values)
            raise config.wrong(name, value, allowed)


def split_blocks(fused: Tensor, config: Config) -> tuple[Tensor, ...]:
    """[3 · C, ...] -> q, k, v [C, ...]. The rows are all queries, then all keys, then all values."""
    return fused.chunk(3)


TENSORS: dict[str, Target] = {
    "transformer.wte.weight": "embed.weight",
    "transformer.blocks.{}.norm_1.weight": "layers.{}.attention_norm.weight",
    "transformer.blocks.{}.attn.Wqkv.weight": Fused(
        tuple(f"layers.{{}}.attention.{name}.weight" for name in "qkv"), split_blocks
    ),
    "transformer.blocks.{}.attn.out_proj.weight": "layers.{}.attention.o.weight",
    "transformer.blocks.{}.norm_2.weight": "layers.{}.mlp_norm.weight",
    "transformer.blocks.{}.ffn.up_proj.weight": "layers.{}.mlp.up.weight",
    "transformer.blocks.{}.ffn.down_proj.weight": "layers.{}.mlp.down.weight",
    "transformer.norm_f.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}

FAMILY = Family(read_config, Model, TENSORS, prefix="transformer.")
