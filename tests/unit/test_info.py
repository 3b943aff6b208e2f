"""The commands info and models: the description of a checkpoint, for which no weight is read."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import streamllm
from streamllm.cli import main
from streamllm.info import describe
from streamllm.loading import open_source
from streamllm.weights import MODEL_TYPES
from streamllm.weights.checkpoint import Checkpoint, TensorReader
from tests import tiny
from tests.hub import client, serve


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(TensorReader, "read", refuse)


def described(folder: Path, config: dict[str, object] | None = None, **numbers: object) -> dict[str, str]:
    """The description of a checkpoint: heading -> its lines, joined. With `config`, of one without weights."""
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    found: dict[str, str] = {}
    last = ""
    for heading, line in describe(Checkpoint(open_source(folder)), **numbers):
        last = heading or last
        found[last] = f"{found[last]}; {line}" if not heading else line
    return found


def run(capsys, *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    return end.value.code, *capsys.readouterr()


LLAMA_31 = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "architectures": ["LlamaForCausalLM"],
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
    "use_cache": True, "eos_token_id": [128001, 128008],
}  # fmt: skip


def test_rounded_weights_are_counted(tmp_path: Path) -> None:
    sizes = {}
    for name in (None, "int8", "int4"):
        config = json.loads((Path(streamllm.loading.embedded_folder()) / "config.json").read_text())
        sizes[name] = described(tmp_path, config, quantize=name)["parameters"]
        model = streamllm.models.llama.Model(Checkpoint(open_source(tmp_path)).config).bfloat16()
        for weight in model.parameters():
            weight.data.fill_(0.01)
        if name is not None:
            streamllm.models.linear.quantize(model, name)
        tensors = [*model.parameters(), *model.buffers()] if name else list(model.parameters())
        held = sum(tensor.nbytes for tensor in tensors if tensor.dtype != torch.float64)
        assert f": {held / 1e6:.1f} MB in {name or 'bfloat16'}" in sizes[name]
    assert "int4, the rest in bfloat16 (the default with rounded weights)" in sizes["int4"]
    with pytest.raises(ValueError, match='quantize must be None, "int8" or "int4"'):
        described(tmp_path, quantize="int3")


def test_a_llama_is_described_from_its_config_alone(tmp_path: Path) -> None:
    found = described(tmp_path, LLAMA_31)
    assert found["architecture"] == (
        "llama: 32 layers, width 4,096, MLP 14,336, vocabulary 128,256; "
        "the head has its own weights (not tied)"
    )
    assert found["parameters"] == "8,030,261,248: 16.1 GB in bfloat16 (as the config says)"
    assert found["heads"] == "32 for queries, 8 for keys and values, of 128 dimensions"
    assert found["positions"] == (
        "rotary, llama3: theta 500,000, all dimensions rotated; "
        "factor 8, low_freq_factor 1, high_freq_factor 4, original 8192"
    )
    assert found["trained for"] == "131,072 tokens"
    assert found["files"] == "no weights here"
    assert found["cache"] == (
        "131,072 bytes per token in bfloat16; "
        "4 sinks and 4,092 recent tokens: 536.9 MB, however long the stream"
    )
    assert found["no effect"] == "architectures, use_cache"
    assert "window" not in found


def test_the_cache_follows_the_options(tmp_path: Path) -> None:
    found = described(tmp_path, LLAMA_31, sinks=0, window=100, dtype="float32")
    assert found["parameters"].endswith("32.1 GB in float32 (as asked for)")
    assert found["cache"].startswith(
        "262,144 bytes per token in float32; 0 sinks and 100 recent tokens: 26.2 MB"
    )
    with pytest.raises(ValueError, match="dtype is 'int4'"):
        described(tmp_path, dtype="int4")


OTHERS: dict[str, tuple[dict[str, object], dict[str, str]]] = {
    "falcon-rw-1b": (
        {"model_type": "falcon", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32,
         "vocab_size": 50304, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
        {"positions": "ALiBi: slopes from 0.840896 to 0.00390625", "trained for": "any length",
         "architecture": "the head is the embedding", "heads": "32 for queries, 32 for keys",
         "parameters": "1,311,625,216: 5.2 GB in float32 (the config names no dtype)"},
    ),
    "falcon-40b": (
        {"model_type": "RefinedWeb", "hidden_size": 8192, "n_layer": 60, "n_head": 128, "n_head_kv": 8,
         "vocab_size": 65024, "torch_dtype": "bfloat16"},
        {"heads": "128 for queries, 8 for keys and values, of 64", "cache": "122,880 bytes per token"},
    ),
    "pythia": (
        {"model_type": "gpt_neox", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
         "num_attention_heads": 12, "vocab_size": 50304, "max_position_embeddings": 2048,
         "torch_dtype": "float16", "rotary_pct": 0.25},
        {"positions": "rotary: theta 10,000, 16 of 64 dimensions rotated", "trained for": "2,048 tokens",
         "parameters": "162,322,944: 324.6 MB in float16"},
    ),
    "mistral": (
        {"model_type": "mistral", "sliding_window": 4096},
        {"window": "sliding, 4,096 tokens, in 32 of 32 layers", "heads": "32 for queries, 8 for keys"},
    ),
    "longrope": (
        {**LLAMA_31, "rope_scaling": {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 64,
                                      "long_factor": [1.0, *[5.5] * 63]}},
        {"positions": "short_factor 64 numbers in 1 … 1, long_factor 64 numbers in 1 … 5.5"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_are_described_from_their_configs(tmp_path: Path, name: str) -> None:
    config, expected = OTHERS[name]
    found = described(tmp_path, config)
    for heading, part in expected.items():
        assert part in found[heading]


def test_the_description_agrees_with_the_loaded_model(checkpoint: Path, capsys, monkeypatch) -> None:
    code, out, err = run(capsys, "info", checkpoint, "--window", 50)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines()), default=0) <= 110
    assert re.search(
        r"^files +model.safetensors  [\d.]+ kB\n +21 tensors of F32\n +tokenizer.json$", out, re.M
    )
    monkeypatch.undo()
    model = streamllm.load_model(checkpoint, device="cpu")
    assert f"{sum(p.numel() for p in model.parameters()):,}: " in out
    cache = streamllm.SinkCache(model, sinks=4, window=50)
    assert f"{cache.nbytes / 1000:.1f} kB, however long" in out
    assert f"{cache.nbytes // 54:,} bytes per token" in out


def test_a_window_beyond_the_trained_length_is_a_warning(checkpoint: Path, capsys) -> None:
    code, _, err = run(capsys, "info", checkpoint, "--window", 5000)
    assert code == 0
    assert err.startswith("Warning: sinks + window = 5004 is longer than the 256 tokens")


def test_shards_are_listed_with_their_sizes_and_a_missing_one_is_shown(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path, tiny.checkpoint(shards=3))
    files = described(folder)["files"]
    assert files.count("model-0000") == 3
    assert "3 files, " in files
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors  MISSING" in described(folder)["files"]


def test_info_fetches_no_weights_from_the_hub(tmp_path: Path, capsys) -> None:
    with serve() as hub:
        commit = hub.add("org/sharded", tiny.checkpoint(shards=3))
        with client(hub, tmp_path):
            code, out, err = run(capsys, "info", "org/sharded")
        assert code == 0, err
        assert out.startswith(f"name         org/sharded at {commit}\n")
        assert out.count("model-0000") == 3
        assert not [file for file in hub.fetched if file.endswith(".safetensors")]


def test_a_checkpoint_that_cannot_be_described_is_an_error_of_one_sentence(
    checkpoint: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gptj"}')
    for args, message in (
        ((tmp_path,), "model_type is 'gptj'; supported: "),
        ((tmp_path / "nothing",), "there is no folder"),
        ((checkpoint, "--sinks", 300), "300 sinks leave no room"),
        ((checkpoint, "--dtype", "int4"), "dtype is 'int4'"),
    ):
        code, out, err = run(capsys, "info", *args)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert message in err


def test_models_lists_every_model_type_and_example(capsys) -> None:
    code, out, _ = run(capsys, "models")
    assert code == 0
    for model_type in MODEL_TYPES:
        assert re.search(rf"^{model_type} ", out, re.M)
    examples = [name for row in MODEL_TYPES.values() for variant in row.variants for name in variant.examples]
    assert all(name in out for name in examples)
    assert max(map(len, out.splitlines())) <= 100


def test_a_family_without_examples_is_listed_too(capsys, monkeypatch) -> None:
    monkeypatch.setitem(MODEL_TYPES, "mpt", dataclasses.replace(MODEL_TYPES["mpt"], variants=()))
    assert re.search(r"^mpt$", run(capsys, "models")[1], re.M)


def test_the_model_is_built_on_the_meta_device(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_31))
    model = Checkpoint(open_source(tmp_path)).build()
    assert all(parameter.device == torch.device("meta") for parameter in model.parameters())


def test_the_tokenizer_is_described(copy):
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    lines = list(describe(Checkpoint(open_source(copy))))
    index = [name for name, _ in lines].index("tokenizer")
    assert re.match(r"\d+ ids; it adds (BOS|neither BOS nor EOS) to a text", lines[index][1])
    assert any("add_eos_token of tokenizer_config.json has no effect" in line for _, line in lines)
    (copy / "tokenizer.json").write_text("{}")
    assert any("cannot be loaded" in line for _, line in describe(Checkpoint(open_source(copy))))
