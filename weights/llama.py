"""Llama checkpoints: config.json -> Config, names of tensors on disk -> names in models/llama.py."""

from __future__ import annotations

from streamllm.models.base import ACTIVATIONS
from streamllm.models.llama import Config, Model
from streamllm.weights.config_reader import ConfigReader
from streamllm.weights.family import NOT_NEEDED, Family, with_bias
from streamllm.weights.rope import read_rope


def read_config(config: ConfigReader, match_transformers: bool) -> Config:
    """The model's Config. Absent keys have transformers' defaults."""
    width, heads = config.size("hidden_size", 4096), config.size("num_attention_heads", 32)
    if width % heads:
        raise config.wrong("num_attention_heads", heads, f"a divisor of hidden_size, {width}")
    return read_llama_like(
        config,
        match_transformers,
        vocab_size=32000,
        mlp_width=11008,
        kv_heads=heads,
        head_dim=width // heads,
        positions=2048,
        attention_bias=config.flag("attention_bias", False),
        mlp_bias=config.flag("mlp_bias", False),
    )


def read_llama_like(
    config: ConfigReader,
    match_transformers: bool,
    *,
    vocab_size: int,
    mlp_width: int,
    kv_heads: int,
    head_dim: int | None,
    positions: int,
    attention_bias: bool,
    mlp_bias: bool = False,
    output_bias: bool = True,
    head_norms: bool = False,
    windows: tuple[int | None, ...] = (),
) -> Config:
    """The Config of any model that models/llama.py computes.

    `vocab_size` to `positions` are the defaults for absent keys; head_dim None stands for hidden_size / heads.
    The other arguments are properties of the model. num_key_value_heads null does not count as absent: it
    stands for the number of heads.
    """
    width = config.size("hidden_size", 4096)
    heads = config.size("num_attention_heads", 32)
    kv_heads = config.size("num_key_value_heads", heads if config.has("num_key_value_heads") else kv_heads)
    if heads % kv_heads:
        raise config.wrong("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads, {heads}")
    head_dim = config.size("head_dim", head_dim or width // heads, 2)
    if head_dim % 2:
        raise config.wrong("head_dim", head_dim, "an even number, because RoPE rotates pairs of dimensions")
    positions = config.size("max_position_embeddings", positions)
    rope = read_rope(config, head_dim, "rope_theta", positions, match_transformers)
    return Config(
        vocab_size=config.size("vocab_size", vocab_size),
        width=width,
        mlp_width=config.size("intermediate_size", mlp_width),
        layers=config.depth("num_hidden_layers", 32),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope=rope,
        trained_length=rope.trained_length(positions),
        norm_eps=config.number("rms_norm_eps", 1e-6, 0.0),
        activation=config.choice("hidden_act", "silu", ACTIVATIONS),
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        tied=config.flag("tie_word_embeddings", False),
        output_bias=output_bias,
        head_norms=head_norms,
        windows=windows,
    )


TENSORS = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{}.input_layernorm.weight": "layers.{}.attention_norm.weight",
    **with_bias(
        {
            "model.layers.{}.self_attn.q_proj": "layers.{}.attention.q",
            "model.layers.{}.self_attn.k_proj": "layers.{}.attention.k",
            "model.layers.{}.self_attn.v_proj": "layers.{}.attention.v",
            "model.layers.{}.self_attn.o_proj": "layers.{}.attention.o",
            "model.layers.{}.mlp.gate_proj": "layers.{}.mlp.gate",
            "model.layers.{}.mlp.up_proj": "layers.{}.mlp.up",
            "model.layers.{}.mlp.down_proj": "layers.{}.mlp.down",
        }
    ),
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.mlp_norm.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
    "model.layers.{}.self_attn.rotary_emb.inv_freq": NOT_NEEDED,
    "model.rotary_emb.inv_freq": NOT_NEEDED,
}

FAMILY = Family(read_config, Model, TENSORS, prefix="model.")
