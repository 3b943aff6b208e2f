"""Our logits are transformers' logits, over the whole grid (semantics: no eviction)."""

from __future__ import annotations

import pytest
import torch

import streamllm
from tests.checkpoints import Variant, make
from tests.parity.grid import VARIANTS

TOLERANCE = 5e-5  # times the spread of the logits, in float32


def text(vocab_size: int, length: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(7))


def reference(folder, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """transformers' logits, by a model that no earlier call has changed."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    variant: Variant = request.param
    return variant, make(tmp_path_factory.mktemp(variant.name), variant)


def test_float32_as_transformers_rounds(case) -> None:
    variant, folder = case
    tokens = text(variant.config["vocab_size"], variant.length)
    theirs = reference(folder, tokens, torch.float32)
    model = streamllm.load_model(folder, dtype="float32", match_transformers=True)
    assert (model(tokens) - theirs).abs().max() <= TOLERANCE * theirs.std()


def test_float32_as_the_config_says(case) -> None:
    variant, folder = case
    tokens = text(variant.config["vocab_size"], 64)
    theirs = reference(folder, tokens, torch.float32)
    model = streamllm.load_model(folder, dtype="float32")
    assert (model(tokens) - theirs).abs().max() <= TOLERANCE * theirs.std()


def test_bfloat16_is_no_further_than_transformers_is_from_itself(case) -> None:
    variant, folder = case
    tokens = text(variant.config["vocab_size"], variant.length)
    exact = reference(folder, tokens, torch.float32)
    theirs = reference(folder, tokens, torch.bfloat16).float()
    model = streamllm.load_model(folder, dtype="bfloat16", match_transformers=True)
    assert (model(tokens).float() - theirs).abs().mean() <= (theirs - exact).abs().mean()
