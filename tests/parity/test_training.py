"""A loaded model can be trained: gradients equal transformers', the loss falls, and weights are packed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch.nn import functional as F

import streamllm
from streamllm.models.packed_weight import PackedWeight

SIZES = {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 256}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
    "llama, tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**LLAMA, sliding_window=24)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA, head_dim=16)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**SIZES, intermediate_size=96, rotary_pct=0.5)
    ),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**SIZES, bias=False)),
    "falcon, rw": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(
            **SIZES,
            multi_query=False,
            parallel_attn=False,
            new_decoder_architecture=False,
            alibi=True,
            bias=True,
        )
    ),
    "mpt": lambda: hf.MptForCausalLM(
        hf.MptConfig(vocab_size=160, d_model=64, n_heads=4, n_layers=2, max_seq_len=256)
    ),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = torch.randint(0, 160, (3, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=list(FAMILIES))
def folder(request, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("training")
    FAMILIES[request.param]().eval().save_pretrained(path)
    return path


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), TOKENS[:, 1:].flatten())


def packed_weights(model: torch.nn.Module) -> int:
    return sum(isinstance(weight, PackedWeight) for weight in model.parameters())


def embedding_gradient(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    reference = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    loss_of(reference(TOKENS).logits).backward()
    return reference.get_input_embeddings().weight.grad.float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twenty_steps_of_adamw(folder, dtype):
    model = streamllm.load_model(folder, dtype=dtype, device="cpu", match_transformers=True)
    packed = packed_weights(model)
    assert not any(weight.requires_grad for weight in model.parameters())
    model.requires_grad_(True)
    loss_of(model(TOKENS)).backward()
    assert all(weight.grad is not None for weight in model.parameters())

    exact, theirs = embedding_gradient(folder, torch.float32), embedding_gradient(folder, dtype)
    off = (model.embed.weight.grad.float() - exact).abs().mean()
    if dtype == torch.float32:
        assert off <= 1e-6 * exact.abs().mean()
    else:
        assert off <= 1.1 * (theirs - exact).abs().mean()

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4 if dtype == torch.float16 else 1e-8)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(model(TOKENS))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]

    model.eval()
    assert packed_weights(model) == packed
    with torch.no_grad():
        assert float(loss_of(model(TOKENS))) < losses[-1] + 0.01
    model.train()  # the optimizer still holds the model's weights
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model(TOKENS))
        loss.backward()
        optimizer.step()
    assert loss.item() < losses[-1]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_adapter_is_trained_and_merged(folder, dtype, training):
    peft = pytest.importorskip("peft")
    model = streamllm.load_model(folder, dtype=dtype, device="cpu")
    packed = packed_weights(model)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q", "k", "v", "o", "up", "down"])
    adapted = peft.get_peft_model(model, config).train(training)
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(adapted(TOKENS))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(bool(weight.grad.abs().sum() > 0) for weight in trained)
    with torch.no_grad():
        before = float(loss_of(adapted.eval()(TOKENS)))
        merged = adapted.merge_and_unload().eval()
        assert abs(float(loss_of(merged(TOKENS))) - before) < 5e-3
    assert packed_weights(merged) == packed


def test_autocast_computes_as_transformers_does(folder):
    model = streamllm.load_model(folder, dtype=torch.float32, device="cpu", match_transformers=True)
    reference = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        exact = reference(TOKENS).logits
        with torch.autocast("cpu", torch.bfloat16):
            theirs, ours = reference(TOKENS).logits, model(TOKENS)
    assert (ours - exact).abs().mean() <= 1.1 * (theirs - exact).abs().mean()
