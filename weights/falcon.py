"""Falcon checkpoints: config.json -> Config, names of tensors on disk -> names in models/falcon.py.

Old files have the model_type RefinedWeb (40B) or RefinedWebModel (7B, RW) and the keys n_layer, n_head,
n_head_kv and n_embed. Where a file has an old and a new key for the same number, the new one counts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from streamllm.models.alibi import Alibi
from streamllm.models.base import ACTIVATIONS
from streamllm.models.falcon import Config, Model
from streamllm.models.rotary import Rope
from streamllm.weights.config_reader import ConfigReader
from streamllm.weights.family import NOT_NEEDED, Family, fused_qkv, with_bias
from streamllm.weights.rope import read_rope


def read_config(config: ConfigReader, match_transformers: bool) -> Config:
    """The model's Config. Absent keys have transformers' defaults."""
    width = config.size("n_embed", config.size("hidden_size", 4544))
    heads = config.size("num_attention_heads", config.size("n_head", 71))
    if width % heads:
        raise config.wrong("num_attention_heads", heads, f"a divisor of hidden_size, {width}")
    head_dim = width // heads

    # The 40B model and its successors have grouped-query attention; in old files, n_head_kv indicates it.
    grouped = config.flag("new_decoder_architecture", config.get("n_head_kv") is not None)
    kv_heads = config.size("num_kv_heads", config.size("n_head_kv", heads))
    parallel = config.flag("parallel_attn", True)
    norms = config.size("num_ln_in_parallel_attn", 2 if grouped else 1)
    if grouped:
        if heads % kv_heads:
            raise config.wrong("num_kv_heads", kv_heads, f"a divisor of num_attention_heads, {heads}")
        if not parallel:
            raise config.wrong("parallel_attn", parallel, "true with new_decoder_architecture")
        if norms > 2:
            raise config.wrong("num_ln_in_parallel_attn", norms, "1 or 2")
    else:  # num_kv_heads has no effect: in files that were saved again it equals num_attention_heads
        kv_heads = 1 if config.flag("multi_query", True) else heads
        if parallel and norms == 2:
            raise config.wrong("num_ln_in_parallel_attn", norms, "1 without new_decoder_architecture")

    positions = config.size("max_position_embeddings", 2048)
    if config.flag("alibi", False):
        position: Rope | Alibi = Alibi(heads, bfloat16_ranks=match_transformers)
        trained_length = None
    else:
        if head_dim % 2:
            raise config.wrong(
                "num_attention_heads", heads, "a number that makes the heads even in width, as RoPE needs it"
            )
        position = read_rope(config, head_dim, "rope_theta", positions, match_transformers)
        trained_length = position.trained_length(positions)
    return Config(
        vocab_size=config.size("vocab_size", 65024),
        width=width,
        mlp_width=config.size("ffn_hidden_size", 4 * width),
        layers=config.depth("num_hidden_layers", config.depth("n_layer", 32)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        position=position,
        trained_length=trained_length,
        norm_eps=config.number("layer_norm_epsilon", 1e-5, 0.0),
        activation=config.choice("activation", "gelu", ACTIVATIONS),
        bias=config.flag("bias", False),
        parallel=parallel,
        shared_norm=parallel and norms == 1,
        tied=config.flag("tie_word_embeddings", True),
    )


def respell(values: dict[str, Any]) -> dict[str, Any]:
    """An old config.json with the keys of today. Of the old keys, transformers reads only n_embed."""
    values = dict(values)
    if values.get("new_decoder_architecture") is None:
        values["new_decoder_architecture"] = values.get("n_head_kv") is not None
    for old, new in OLD_KEYS.items():
        value = values.pop(old, None)
        if value is not None and (values.get(new) is None or old == "n_embed"):
            values[new] = value
    return values | {"model_type": "falcon", "architectures": ["FalconForCausalLM"]}


OLD_KEYS = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
    "n_embed": "hidden_size",
}


def split_groups(fused: Tensor, config: Config) -> tuple[Tensor, ...]:
    """[(H + 2·G) · D, ...] -> q [H · D, ...], k and v [G · D, ...].

    For each key/value head, the rows are those of its query heads, then its key, then its value. 7B has one
    such group, RW has one for each head.
    """
    queries_per_group = config.heads // config.kv_heads
    groups = fused.view(config.kv_heads, queries_per_group + 2, config.head_dim, *fused.shape[1:])
    return groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)


TENSORS = {
    "transformer.word_embeddings.weight": "embed.weight",
    **fused_qkv("transformer.h.{}.self_attention.query_key_value", split_groups),
    **with_bias(
        {
            "transformer.h.{}.input_layernorm": "layers.{}.attention_norm",  # one norm, or sequential
            "transformer.h.{}.ln_attn": "layers.{}.attention_norm",  # two norms
            "transformer.h.{}.ln_mlp": "layers.{}.mlp_norm",
            "transformer.h.{}.post_attention_layernorm": "layers.{}.mlp_norm",  # sequential
            "transformer.h.{}.self_attention.dense": "layers.{}.attention.o",
            "transformer.h.{}.mlp.dense_h_to_4h": "layers.{}.mlp.up",
            "transformer.h.{}.mlp.dense_4h_to_h": "layers.{}.mlp.down",
            "transformer.ln_f": "norm",
        }
    ),
    "lm_head.weight": "head.weight",
    "transformer.h.{}.self_attention.rotary_emb.inv_freq": NOT_NEEDED,
}

FAMILY = Family(read_config, Model, TENSORS, prefix="transformer.", respell=respell)
