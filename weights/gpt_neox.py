"""GPT-NeoX checkpoints: config.json -> Config, names of tensors on disk -> names in models/gpt_neox.py.

Pythia, GPT-NeoX-20B, Dolly v2, RedPajama-INCITE and StableLM-alpha. (The model_type "stablelm" is another
architecture.)
"""

from __future__ import annotations

from torch import Tensor

from streamllm.models.base import ACTIVATIONS
from streamllm.models.gpt_neox import Config, Model
from streamllm.weights.config_reader import ConfigReader
from streamllm.weights.family import NOT_NEEDED, Family, fused_qkv, with_bias
from streamllm.weights.rope import read_rope


def read_config(config: ConfigReader, match_transformers: bool) -> Config:
    """The model's Config. Absent keys have transformers' defaults.

    At the top level, the family has rotary_emb_base and rotary_pct for what others call rope_theta and
    partial_rotary_factor. These are read only inside rope_parameters or rope_scaling.
    """
    width = config.size("hidden_size", 6144)
    heads = config.size("num_attention_heads", 64)
    if width % heads:
        raise config.wrong("num_attention_heads", heads, f"a divisor of hidden_size, {width}")
    head_dim = width // heads
    scaling = config.inner("rope_scaling") or config.inner("rope_parameters") or ConfigReader({})
    part = scaling.number("partial_rotary_factor", config.number("rotary_pct", 0.25, 0.0, 2.0), 0.0, 2.0)
    dim = int(head_dim * part)
    if not 1 <= dim <= head_dim // 2 * 2:  # an odd dim rotates one dimension more
        raise config.wrong(
            "rotary_pct", part, f"a share that makes 1 to {head_dim // 2 * 2} of {head_dim} dimensions"
        )
    positions = config.size("max_position_embeddings", 2048)
    rope = read_rope(config, dim, "rotary_emb_base", positions, match_transformers)
    return Config(
        vocab_size=config.size("vocab_size", 50432),
        width=width,
        mlp_width=config.size("intermediate_size", 24576),
        layers=config.depth("num_hidden_layers", 44),
        heads=heads,
        head_dim=head_dim,
        rope=rope,
        trained_length=rope.trained_length(positions),
        norm_eps=config.number("layer_norm_eps", 1e-5, 0.0),
        activation=config.choice("hidden_act", "gelu", ACTIVATIONS),
        attention_bias=config.flag("attention_bias", True),
        parallel=config.flag("use_parallel_residual", True),
        tied=config.flag("tie_word_embeddings", False),
    )


def split_heads(fused: Tensor, config: Config) -> tuple[Tensor, ...]:
    """[H · 3 · D, ...] -> q, k, v [H · D, ...]. The rows of each head are its q, then its k, then its v."""
    heads = fused.view(config.heads, 3, config.head_dim, *fused.shape[1:])
    return tuple(part.flatten(0, 1) for part in heads.unbind(1))


TENSORS = {
    "gpt_neox.embed_in.weight": "embed.weight",
    **fused_qkv("gpt_neox.layers.{}.attention.query_key_value", split_heads),
    **with_bias(
        {
            "gpt_neox.layers.{}.input_layernorm": "layers.{}.attention_norm",
            "gpt_neox.layers.{}.attention.dense": "layers.{}.attention.o",
            "gpt_neox.layers.{}.post_attention_layernorm": "layers.{}.mlp_norm",
            "gpt_neox.layers.{}.mlp.dense_h_to_4h": "layers.{}.mlp.up",
            "gpt_neox.layers.{}.mlp.dense_4h_to_h": "layers.{}.mlp.down",
            "gpt_neox.final_layer_norm": "norm",
        }
    ),
    "embed_out.weight": "head.weight",
    "lm_head.weight": "head.weight",  # its name in transformers' memory
    "gpt_neox.layers.{}.attention.bias": NOT_NEEDED,  # causal masks in old files
    "gpt_neox.layers.{}.attention.masked_bias": NOT_NEEDED,
    "gpt_neox.layers.{}.attention.rotary_emb.inv_freq": NOT_NEEDED,
    "gpt_neox.rotary_emb.inv_freq": NOT_NEEDED,
}

FAMILY = Family(read_config, Model, TENSORS, prefix="gpt_neox.")
