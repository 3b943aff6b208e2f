"""save_pretrained(): a loaded model, trained or merged, becomes files that transformers and streamllm read."""

import json
import shutil

import pytest
import torch
from torch import nn

import streamllm
from tests.checkpoints import make
from tests.parity import grid

TOKENS = torch.tensor([[1, 2, 3, 50, 5, 9, 17, 4]])
# One of every way to spell tensors: the first of a model_type, and each whose files are changed.
LAYOUTS = list({(v.config["model_type"], str(v.tensors), v.name if v.disguise else ""): v for v in grid.VARIANTS
                if not v.faulty and v.refused is None}.values())  # fmt: skip


def of_transformers(folder):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        return model(TOKENS).logits


def train(model, steps=2):
    """Every weight differs from the checkpoint's afterwards."""
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(TOKENS)[0, :-1].float(), TOKENS[0, 1:])
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    del loss
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("variant", LAYOUTS, ids=str)
def test_every_layout_is_written_as_it_was_read(variant, tmp_path):
    folder = make(tmp_path / "original", variant)
    model = streamllm.load_model(folder, dtype="float32", device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01).add_(0.001)  # so that copied files would be wrong
        wanted = model(TOKENS)
    written = streamllm.save_pretrained(model, None, tmp_path / "written")
    again = streamllm.load_model(written, device="cpu")
    for (name, ours), (other, saved) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(ours, saved), name
    with torch.no_grad():
        assert torch.equal(again(TOKENS), wanted)
    assert (of_transformers(written) - wanted).abs().max() <= 5e-5 * wanted.std()


def test_a_model_trained_in_bfloat16_is_saved_with_its_tokenizer(checkpoint, tmp_path):
    model, tokenizer = streamllm.load(checkpoint, dtype="bfloat16", device="cpu")
    before = model.layers[0].attention.q.weight.clone()
    train(model)
    assert not torch.equal(model.layers[0].attention.q.weight, before)
    written = streamllm.save_pretrained(model, tokenizer, tmp_path / "new" / "written", max_shard_size="20KB")
    assert len(list(written.glob("*.safetensors"))) > 1
    again, same_tokenizer = streamllm.load(written, device="cpu")
    assert again.dtype == torch.bfloat16
    assert same_tokenizer.encode("one two") == tokenizer.encode("one two")
    for ours, saved in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, saved)
    with torch.no_grad():
        difference = (of_transformers(written) - model(TOKENS)).float().abs().mean()
    assert difference < 0.02 * of_transformers(written).float().std()


def test_a_compiled_model_is_saved(checkpoint, tmp_path):
    model = streamllm.load_model(checkpoint, device="cpu")
    compiled = streamllm.compile(model, "flat")
    list(streamllm.generate(compiled, [1, 2, 3], max_new_tokens=4, eos=[]))
    again = streamllm.load_model(
        streamllm.save_pretrained(compiled, None, tmp_path / "written"), device="cpu"
    )
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


def test_generation_config_is_written(copy, tmp_path):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "temperature": 0.7}))
    model = streamllm.load_model(copy, device="cpu")
    written = streamllm.save_pretrained(model, None, tmp_path / "written")
    assert json.loads((written / "generation_config.json").read_text())["temperature"] == 0.7
    assert streamllm.load_model(written, device="cpu").generation_config == model.generation_config


def test_merged_adapters_are_saved(checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    model = streamllm.load_model(checkpoint, dtype="float32", device="cpu")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)
    )
    with pytest.raises(ValueError, match="merge adapters first"):
        streamllm.save_pretrained(model, None, tmp_path / "written")
    with pytest.raises(ValueError, match="merge adapters first"):
        streamllm.save_pretrained(adapted, None, tmp_path / "written")
    with torch.no_grad():
        wanted = adapted(TOKENS)
    merged = adapted.merge_and_unload()
    merged.eval()
    written = streamllm.save_pretrained(merged, None, tmp_path / "written")
    assert (of_transformers(written) - wanted).abs().max() <= 5e-5 * wanted.std()


def test_what_cannot_be_saved_is_refused_before_anything_is_written(checkpoint, tmp_path):
    model, tokenizer = streamllm.load(checkpoint, device="cpu")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    with pytest.raises(ValueError, match="not empty"):
        streamllm.save_pretrained(model, tokenizer, full)
    with pytest.raises(ValueError, match="max_shard_size"):
        streamllm.save_pretrained(model, tokenizer, tmp_path / "new", max_shard_size="much")
    with pytest.raises(ValueError, match="made in another way"):
        streamllm.save_pretrained(nn.Linear(2, 2), tokenizer, tmp_path / "new")
    quantised = streamllm.load_model(checkpoint, device="cpu", quantize="int8")
    with pytest.raises(ValueError, match="quantised"):
        streamllm.save_pretrained(quantised, tokenizer, tmp_path / "new")
    gone = tmp_path / "gone"
    shutil.copytree(checkpoint, gone)
    tokenizer = streamllm.load_tokenizer(gone)
    shutil.rmtree(gone)
    with pytest.raises(ValueError, match="files of the tokenizer"):
        streamllm.save_pretrained(model, tokenizer, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_device_and_dtype_of_a_model(checkpoint, quantize):
    model = streamllm.load_model(checkpoint, dtype="bfloat16", device="cpu", quantize=quantize)
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.bfloat16
    assert model.to(torch.float32).dtype == torch.float32
