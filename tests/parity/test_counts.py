"""Parameter counts of well-known checkpoints, from their published configs, without their weights.

Each config has the published keys that act on shapes, and names a public source with the same numbers. litgpt
is litgpt/config.py of github.com/Lightning-AI/litgpt at 26857050. Numbers without a source are named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from streamllm.weights.checkpoint import read_config
from streamllm.weights.config_reader import ConfigReader


@dataclass(frozen=True)
class Published:
    name: str
    config: dict[str, Any]
    parameters: int  # a tied head counts once


PUBLISHED = [
    Published(  # litgpt; https://huggingface.co/meta-llama/Llama-2-7b-hf
        "meta-llama/Llama-2-7b-hf",
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
         "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-05, "vocab_size": 32000,
         "max_position_embeddings": 4096, "tie_word_embeddings": False},
        6_738_415_616,
    ),
    Published(  # litgpt; https://huggingface.co/meta-llama/Llama-3.1-8B
        "meta-llama/Llama-3.1-8B",
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
         "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "vocab_size": 128256,
         "max_position_embeddings": 131072, "rope_theta": 500000.0,
         "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 8192, "rope_type": "llama3"}},
        8_030_261_248,
    ),
    Published(  # litgpt, and table 1 of arXiv 2304.01373
        "EleutherAI/pythia-6.9b",
        {"model_type": "gpt_neox", "hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32,
         "num_hidden_layers": 32, "vocab_size": 50432, "rotary_pct": 0.25, "use_parallel_residual": True,
         "tie_word_embeddings": False},
        6_857_302_016,
    ),
    Published(  # configs/20B.yml of github.com/EleutherAI/gpt-neox, and table 1 of arXiv 2204.06745.
        # The padded vocabulary, 50432, has no source, but the sum is the paper's 20.55 billion.
        "EleutherAI/gpt-neox-20b",
        {"model_type": "gpt_neox", "hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 64,
         "num_hidden_layers": 44, "vocab_size": 50432, "hidden_act": "gelu_fast", "rotary_pct": 0.25,
         "tie_word_embeddings": False},
        20_554_567_680,
    ),
    Published(  # litgpt; https://huggingface.co/tiiuae/falcon-7b
        "tiiuae/falcon-7b",
        {"model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32,
         "num_kv_heads": 71, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False,
         "alibi": False, "bias": False, "vocab_size": 65024},
        6_921_720_704,
    ),
    Published(  # litgpt; https://huggingface.co/tiiuae/falcon-40b
        "tiiuae/falcon-40b",
        {"model_type": "falcon", "hidden_size": 8192, "num_attention_heads": 128, "num_hidden_layers": 60,
         "num_kv_heads": 8, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": True,
         "alibi": False, "bias": False, "vocab_size": 65024},
        41_303_293_952,
    ),
    Published(  # litgpt, and examples/falcon/README.md of github.com/NVIDIA/TensorRT-LLM
        "tiiuae/falcon-180B",
        {"model_type": "falcon", "hidden_size": 14848, "num_attention_heads": 232, "num_hidden_layers": 80,
         "num_kv_heads": 8, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": True,
         "alibi": False, "bias": False, "vocab_size": 65024},
        178_557_088_768,
    ),
    Published(  # The count: keras_hub/src/models/falcon/falcon_presets.py of github.com/keras-team/keras-hub.
        # The single sizes have no source, but they give this count.
        "tiiuae/falcon-rw-1b",
        {"model_type": "falcon", "hidden_size": 2048, "num_attention_heads": 32, "num_hidden_layers": 24,
         "multi_query": False, "parallel_attn": False, "new_decoder_architecture": False, "alibi": True,
         "bias": True, "vocab_size": 50304},
        1_311_625_216,
    ),
    Published(  # Layers, heads and MLP: github.com/vllm-project/vllm/issues/5010. Key heads and theta:
        # github.com/erfanzar/EasyDeL/issues/152. Without a source: tie_word_embeddings and the number of norms.
        "tiiuae/falcon-11B",
        {"model_type": "falcon", "hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 60,
         "num_kv_heads": 8, "new_decoder_architecture": True, "parallel_attn": True, "alibi": False,
         "bias": False, "ffn_hidden_size": 16384, "num_ln_in_parallel_attn": 1, "vocab_size": 65024,
         "tie_word_embeddings": False, "rope_theta": 500042.0, "max_position_embeddings": 8192},
        11_102_822_400,
    ),
    Published(  # scripts/train/yamls/pretrain/mpt-7b.yaml of github.com/mosaicml/llm-foundry. The vocabulary,
        # which is padded further, is from a printed copy of the published config.
        "mosaicml/mpt-7b",
        {"model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432,
         "max_seq_len": 2048, "expansion_ratio": 4, "no_bias": True, "learned_pos_emb": True,
         "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "clip_qkv": None}},
        6_649_286_656,
    ),
    Published(  # As above, mpt-30b.yaml; its 56 heads do not change the count. Without a source: the vocabulary
        "mosaicml/mpt-30b",
        {"model_type": "mpt", "d_model": 7168, "n_heads": 64, "n_layers": 48, "vocab_size": 50432,
         "max_seq_len": 8192, "expansion_ratio": 4, "no_bias": True, "learned_pos_emb": True,
         "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "clip_qkv": None}},
        29_957_200_896,
    ),
    Published(  # litgpt; https://huggingface.co/mistralai/Mistral-7B-v0.1
        "mistralai/Mistral-7B-v0.1",
        {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
         "num_hidden_layers": 32, "num_key_value_heads": 8, "sliding_window": 4096, "vocab_size": 32000,
         "rms_norm_eps": 1e-05, "max_position_embeddings": 32768, "tie_word_embeddings": False},
        7_241_732_096,
    ),
    Published(  # litgpt; https://huggingface.co/Qwen/Qwen2.5-7B
        "Qwen/Qwen2.5-7B",
        {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
         "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064, "rope_theta": 1000000.0,
         "sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28,
         "tie_word_embeddings": False},
        7_615_616_512,
    ),
    Published(  # litgpt; https://huggingface.co/Qwen/Qwen3-8B
        "Qwen/Qwen3-8B",
        {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
         "num_hidden_layers": 36, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
         "attention_bias": False, "rope_theta": 1000000, "max_position_embeddings": 40960,
         "tie_word_embeddings": False},
        8_190_735_360,
    ),
]  # fmt: skip


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.name)
def test_parameter_counts_equal_those_published_and_of_transformers(published: Published) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        family, config = read_config(ConfigReader(published.config))
        ours = family.model(config)
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**published.config))
    assert count(ours) == count(theirs) == published.parameters
