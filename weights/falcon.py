"""How Falcon checkpoints are spelled: config.json -> Config, names on disk -> names in models/falcon.py.

Old files say RefinedWeb (40B) or RefinedWebModel (7B, RW) and n_layer, n_head, n_head_kv, n_embed; some say
both. Where a file has both spellings, the new one counts.
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
    """The numbers that act, with transformers' defaults for keys that are absent."""
    width = config.size("n_embed", config.size("hidden_size", 4544))
    heads = config.size("num_attention_heads", config.size("n_head", 71))
    if width % heads:
        raise config.wrong("num_attention_heads", heads, f"a divisor of hidden_size, {width}")
    head_dim = width // heads

    # 40B and its successors share keys among groups of heads; old files say so by having n_head_kv at all.
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
    else:  # whatever num_kv_heads says: files that were saved again say num_attention_heads
        kv_heads = 1 if config.flag("multi_query", True) else heads
        if parallel and norms == 2:
            raise config.wrong("num_ln_in_parallel_attn", norms, "1 without new_decoder_architecture")

    positions = config.size("max_position_embeddings", 2048)
    if config.flag("alibi", False):
        position: Rope | Alibi = Alibi(heads, bfloat16_ranks=match_transformers)
        trained_length = None
    else:
        if head_dim % 2:
            raise config.wrong("num_attention_heads", heads, "what makes heads of even width, for rotation")
        theta = config.number("rope_theta", 10000.0)
        position = read_rope(config, head_dim, theta, positions, match_transformers)
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
    """An old config.json as transformers reads it today: of the old names it knows n_embed only."""
    values = dict(values)
    if values.get("new_decoder_architecture") is None:
        values["new_decoder_architecture"] = values.get("n_head_kv") is not None
    for old, new in OLD.items():
        value = values.pop(old, None)
        if value is not None and (values.get(new) is None or old == "n_embed"):
            values[new] = value
    return values | {"model_type": "falcon", "architectures": ["FalconForCausalLM"]}


OLD = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
    "n_embed": "hidden_size",
}


def split_groups(fused: Tensor, config: Config) -> tuple[Tensor, ...]:
    """Each key/value head's rows follow those of the queries that it serves: [(H + 2·G) · D, ...] -> q, k, v.

    One group of all heads in 7B, one for each head in RW.
    """
    G, shared = config.kv_heads, config.heads // config.kv_heads
    groups = fused.view(G, shared + 2, config.head_dim, *fused.shape[1:])
    return groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)


TENSORS = {
    "transformer.word_embeddings.weight": "embed.weight",
    **fused_qkv("transformer.h.{}.self_attention.query_key_value", split_groups),
    **with_bias(
        {
            "transformer.h.{}.input_layernorm": "layers.{}.attention_norm",  # with one norm, or sequential
            "transformer.h.{}.ln_attn": "layers.{}.attention_norm",  # with two
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
