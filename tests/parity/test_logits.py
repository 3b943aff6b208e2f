"""Logits without eviction are those of transformers, for every checkpoint of the grid."""

from __future__ import annotations

import pytest
import torch

import streamllm
from tests.parity.cases import TOLERANCE, Case


def test_float32_with_match_transformers(case: Case) -> None:
    assert case.distance(match_transformers=True) <= TOLERANCE


def test_float32_in_the_default_reading(case: Case) -> None:
    if case.variant.refused:
        with pytest.raises(streamllm.UnsupportedConfig, match=case.variant.refused):
            streamllm.load_model(case.folder)
    else:
        assert case.distance(match_transformers=False) <= TOLERANCE


def test_bfloat16_differs_no_more_than_transformers_does_from_its_float32(case: Case) -> None:
    length = case.variant.length
    exact = case.reference(length, torch.float32)
    theirs = case.reference(length, torch.bfloat16).float()
    model = streamllm.load_model(case.folder, dtype="bfloat16", match_transformers=True)
    ours = model(case.tokens(length)).float()
    assert (ours - theirs).abs().mean() <= (theirs - exact).abs().mean()
