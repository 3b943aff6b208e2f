"""Attention weights and scores of `streamllm.evaluate`, compared with transformers, family by family."""

import pytest
import torch

import streamllm
from streamllm.evaluate import attention, perplexity
from tests.checkpoints import make
from tests.parity.grid import VARIANTS

pytest.importorskip("transformers")
NAMES = (
    "llama-gqa", "gpt_neox-pythia", "falcon-7b", "falcon-40b", "mpt-clipped", "mistral-v0.1", "qwen2-layer-types",
    "qwen3-0.6b",
)  # fmt: skip


@pytest.fixture(params=[v for v in VARIANTS if v.name in NAMES], ids=lambda v: v.name, scope="module")
def folder(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp("checkpoint"), request.param)


@torch.no_grad()
def test_attention_weights_are_those_of_transformers(folder):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model = streamllm.load_model(folder, dtype="float32", device="cpu")
    text = torch.randint(0, 100, (1, 60), generator=torch.Generator().manual_seed(1))
    expected = torch.stack(theirs(text, output_attentions=True).attentions)[:, 0]
    torch.testing.assert_close(attention(model, text).weights.float(), expected, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_dense_scores_are_those_of_transformers(folder):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = streamllm.load_model(folder, dtype="float32", device="cpu")
    text = torch.randint(0, 100, (1, 60), generator=torch.Generator().manual_seed(1))
    loss = float(theirs(text, labels=text).loss)
    assert perplexity(model, text[0], mode="dense", chunk=13).mean == pytest.approx(loss, rel=1e-5)
