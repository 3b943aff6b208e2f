"""Loading needs the memory of the result, of one tensor, and of a few mapped pages."""

import json

import pytest
from safetensors.torch import load_file, save_file

import streamllm
from streamllm.models import linear
from streamllm.weights.checkpoint import reader
from tools import load_memory


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_is_the_larger_of_file_and_result(tmp_path, monkeypatch, dtype):
    monkeypatch.setitem(load_memory.CONFIG, "vocab_size", 2000)  # the largest tensor has 23 MB
    size = load_memory.make(tmp_path, 250_000_000)
    peak, _, result, _ = load_memory.measure(tmp_path, "streamllm", dtype)
    assert result > 0.99 * size
    assert peak < max(size, result) + 130_000_000


@pytest.mark.parametrize("threads", [1, 2])
def test_mapped_and_copied_tensors_use_different_maps(tmp_path, monkeypatch, threads):
    """A mapped tensor keeps its whole map in memory, with the pages that were read for copies."""
    monkeypatch.setitem(load_memory.CONFIG, "vocab_size", 1000)
    monkeypatch.setitem(load_memory.CONFIG, "hidden_size", 128)
    monkeypatch.setitem(load_memory.CONFIG, "intermediate_size", 256)
    load_memory.make(tmp_path, 3_000_000)
    for file in tmp_path.glob("*.safetensors"):
        save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    opened = []

    def counted(stored):
        read = opening(stored)
        opened.append([])

        def remembered(name, tensors=opened[-1]):
            tensors.append(read(name))
            return tensors[-1]

        return remembered

    opening = reader._open
    monkeypatch.setattr(reader, "_open", counted)
    monkeypatch.setattr(linear.torch, "get_num_threads", lambda: threads)
    model = streamllm.load_model(tmp_path, device="cpu")
    held = {weight.data_ptr() for weight in model.parameters()}
    stay = [[tensor.data_ptr() in held for tensor in tensors] for tensors in opened]
    assert any(all(tensors) for tensors in stay)
    assert all(all(tensors) or not any(tensors) for tensors in stay)
    # Small tensors are copied: a mapped one would keep the pages around it in memory.
    mapped = {tensor.data_ptr() for tensors in opened for tensor in tensors}
    assert model.embed.weight.data_ptr() in mapped
    assert model.norm.weight.data_ptr() not in mapped
