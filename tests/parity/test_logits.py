"""Our logits are transformers' logits, over the whole grid (semantics: no eviction)."""

from __future__ import annotations

import pytest
import torch

import streamllm
from tests.parity.cases import TOLERANCE, Case


def test_float32_as_transformers_rounds(case: Case) -> None:
    assert case.distance(match_transformers=True) <= TOLERANCE


def test_float32_as_the_config_says(case: Case) -> None:
    if case.variant.refused:
        with pytest.raises(streamllm.UnsupportedConfig, match=case.variant.refused):
            streamllm.load_model(case.folder)
    else:
        assert case.distance(match_transformers=False) <= TOLERANCE


def test_bfloat16_is_no_further_than_transformers_is_from_itself(case: Case) -> None:
    length = case.variant.length
    exact = case.reference(length, torch.float32)
    theirs = case.reference(length, torch.bfloat16).float()
    model = streamllm.load_model(case.folder, dtype="bfloat16", match_transformers=True)
    ours = model(case.tokens(length)).float()
    assert (ours - theirs).abs().mean() <= (theirs - exact).abs().mean()
