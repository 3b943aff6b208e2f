"""Mistral checkpoints: as Llama's, with other defaults and a sliding window in every layer."""

from __future__ import annotations

from streamllm.models.llama import Config, Model
from streamllm.weights.config_reader import ConfigReader
from streamllm.weights.family import Family
from streamllm.weights.llama import TENSORS, read_llama_like


def read_config(config: ConfigReader, match_transformers: bool) -> Config:
    """The model's Config. Absent keys have transformers' defaults."""
    window = None  # null stands for no window, an absent key for 4096
    if not config.has("sliding_window") or config.get("sliding_window") is not None:
        window = config.size("sliding_window", 4096)
    return read_llama_like(
        config,
        match_transformers,
        vocab_size=32000,
        mlp_width=14336,
        kv_heads=8,
        head_dim=None,
        positions=131072,
        attention_bias=False,
        windows=(window,) * config.depth("num_hidden_layers", 32),
    )


FAMILY = Family(read_config, Model, TENSORS, prefix="model.")
