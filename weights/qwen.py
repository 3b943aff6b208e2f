"""Qwen2, Qwen2.5 and Qwen3 checkpoints: as Llama's, with other defaults, biases and norms."""

from __future__ import annotations

from streamllm.models.llama import Config, Model
from streamllm.weights.config_reader import ConfigReader
from streamllm.weights.family import Family
from streamllm.weights.llama import TENSORS, read_llama_like

FULL, SLIDING = "full_attention", "sliding_attention"  # in layer_types


def read_qwen2(config: ConfigReader, match_transformers: bool) -> Config:
    """The model's Config. Absent keys have transformers' defaults."""
    return read_llama_like(
        config,
        match_transformers,
        vocab_size=151936,
        mlp_width=22016,
        kv_heads=32,
        head_dim=None,
        positions=32768,
        attention_bias=True,
        output_bias=False,
        windows=_windows(config),
    )


def read_qwen3(config: ConfigReader, match_transformers: bool) -> Config:
    """The model's Config. Absent keys have transformers' defaults."""
    return read_llama_like(
        config,
        match_transformers,
        vocab_size=151936,
        mlp_width=22016,
        kv_heads=32,
        head_dim=128,
        positions=32768,
        attention_bias=config.flag("attention_bias", False),
        head_norms=True,
        windows=_windows(config),
    )


def _windows(config: ConfigReader) -> tuple[int | None, ...]:
    """The sliding window of each layer, or None.

    Most files have a sliding_window that use_sliding_window switches off. Otherwise the upper layers have it,
    from max_window_layers on.
    """
    layers = config.depth("num_hidden_layers", 32)
    window = None
    if config.flag("use_sliding_window", False) and (
        not config.has("sliding_window") or config.get("sliding_window") is not None
    ):
        window = config.size("sliding_window", 4096)
    types = config.get("layer_types")
    if types is None:
        full = config.size("max_window_layers", 28, 0)
        return tuple(window if layer >= full else None for layer in range(layers))
    if (
        not isinstance(types, list)
        or len(types) != layers
        or not all(kind in (FULL, SLIDING) for kind in types)
    ):
        raise config.wrong("layer_types", types, f"{FULL} or {SLIDING} for each of {layers} layers")
    if SLIDING in types and window is None:
        raise config.wrong("layer_types", SLIDING, f"{FULL} without use_sliding_window and sliding_window")
    return tuple(window if kind == SLIDING else None for kind in types)


HEAD_NORMS = {
    "model.layers.{}.self_attn.q_norm.weight": "layers.{}.attention.q_norm.weight",
    "model.layers.{}.self_attn.k_norm.weight": "layers.{}.attention.k_norm.weight",
}

QWEN2 = Family(read_qwen2, Model, TENSORS, prefix="model.")
QWEN3 = Family(read_qwen3, Model, {**TENSORS, **HEAD_NORMS}, prefix="model.")
