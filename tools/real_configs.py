"""Real configs, scaled down to tiny models with large random weights, computed here and by transformers."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import streamllm
from streamllm.weights import MODEL_TYPES

TOLERANCE = 5e-5  # of the standard deviation of the logits
HEAD_DIM, HEADS, TOKENS = 16, 8, 64


class Config(NamedTuple):
    """A config among the files."""

    name: str
    scaled: str  # JSON


def find_configs(folders: Iterable[Path]) -> Iterator[Config]:
    """Every config.json of a supported model_type, scaled down."""
    for folder in folders:
        for path in sorted(folder.rglob("*config*.json")):
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, OSError):
                continue
            if isinstance(values, dict) and str(values.get("model_type")) in MODEL_TYPES:
                yield Config(str(path.relative_to(folder)), json.dumps(scale_down(values), sort_keys=True))


def scale_down(values: dict[str, Any]) -> dict[str, Any]:
    """The config with small sizes. The groups of heads, the rotary share and all other numbers stay."""
    small = {key: value for key, value in values.items() if key not in ("quantization_config", "auto_map")}
    heads = values.get("num_attention_heads") or values.get("n_heads") or values.get("n_head") or 32
    kv_heads = (
        values.get("num_key_value_heads") or values.get("num_kv_heads") or values.get("n_head_kv") or heads
    )
    group = max(1, min(HEADS, heads // max(1, kv_heads)))
    sizes = {
        "hidden_size": HEADS * HEAD_DIM, "d_model": HEADS * HEAD_DIM, "n_embed": HEADS * HEAD_DIM,
        "intermediate_size": 96, "ffn_hidden_size": 96,
        "num_hidden_layers": 2, "n_layers": 2, "n_layer": 2,
        "num_attention_heads": HEADS, "n_heads": HEADS, "n_head": HEADS,
        "num_key_value_heads": HEADS // group, "num_kv_heads": HEADS // group, "n_head_kv": HEADS // group,
        "vocab_size": 160, "head_dim": HEAD_DIM, "max_window_layers": 1,
    }  # fmt: skip
    small |= {key: size for key, size in sizes.items() if values.get(key) is not None}
    small |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if isinstance(values.get("layer_types"), list):
        small["layer_types"] = (values["layer_types"] * 2)[:2]
    if isinstance(values.get("sliding_window"), int):
        small["sliding_window"] = min(values["sliding_window"], 24)
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(values.get(key), dict):
            small[key] = {
                name: value[: HEAD_DIM // 2] if isinstance(value, list) else value
                for name, value in values[key].items()
            }
    return small


def compare_config(config: Config) -> tuple[object, ...]:
    """A row: the largest difference of the logits, in units of their standard deviation."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(tempfile.mkdtemp())
    try:
        values = json.loads(config.scaled)
        try:
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**values), dtype=torch.float32, attn_implementation="sdpa"
            ).eval()
        except Exception as error:  # its checks raise errors of many types
            return config.name, "transformers refuses", _ours_refuses(values, folder, error)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(
                    noise / parameter.shape[-1] ** 0.5 * 1.5 if parameter.dim() > 1 else 1 + 0.2 * noise
                )
        model.save_pretrained(folder)
        (folder / "config.json").write_text(config.scaled)
        tokens = torch.randint(0, values.get("vocab_size") or 100, (1, TOKENS), generator=generator)
        with torch.no_grad():
            expected = model(tokens).logits
        try:
            found = streamllm.load_model(folder, dtype="float32", match_transformers=True)(tokens)
        except streamllm.UnsupportedConfig as error:
            return config.name, "refused here", str(error)[:150]
        error = float((found - expected).abs().max() / expected.std())
        return config.name, f"{error:.1e}", "" if error <= TOLERANCE else "too large"
    finally:
        shutil.rmtree(folder)


def _ours_refuses(values: dict[str, Any], folder: Path, theirs: Exception) -> str:
    """Empty if this library refuses the config, too."""
    (folder / "config.json").write_text(json.dumps(values))
    try:
        streamllm.load_model(folder)
    except streamllm.UnsupportedConfig:
        return ""
    except streamllm.CheckpointError:
        pass
    return f"transformers: {type(theirs).__name__}: {str(theirs)[:120]}"
