"""Tiny checkpoints as {file name: bytes}, for tests that load, serve or damage one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tools.load_memory import llama_shapes

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 258,
    "torch_dtype": "float32",
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def tensors(config: dict[str, Any] | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a Llama, large enough that a wrong tensor changes the logits clearly."""
    random = torch.Generator().manual_seed(seed)
    shapes = llama_shapes(CONFIG | (config or {}))
    return {name: torch.randn(shape, generator=random) * 0.3 for name, shape in shapes.items()}


def tokenizer() -> dict[str, bytes]:
    """A byte-level tokenizer without merges: 256 bytes, <s> and </s>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>")])
    return {
        "tokenizer.json": made.to_str().encode(),
        "tokenizer_config.json": b'{"bos_token": "<s>", "eos_token": "</s>"}',
    }


def checkpoint(
    config: dict[str, Any] | None = None, weights: dict[str, Tensor] | None = None, shards: int = 1
) -> dict[str, bytes]:
    """All files of a checkpoint in the Hugging Face layout."""
    weights = tensors(config) if weights is None else weights
    files = {"config.json": json.dumps(CONFIG | (config or {})).encode(), **tokenizer()}
    files["generation_config.json"] = b'{"eos_token_id": 257}'
    if shards == 1:
        return files | {SINGLE: save(weights, {"format": "pt"})}
    names = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    places = {tensor: names[i * shards // len(weights)] for i, tensor in enumerate(weights)}
    for name in names:
        files[name] = save(
            {tensor: weights[tensor] for tensor in weights if places[tensor] == name}, {"format": "pt"}
        )
    files[INDEX] = json.dumps({"metadata": {"total_size": 0}, "weight_map": places}).encode()
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Writes the files of a checkpoint into a folder, and returns the folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder
