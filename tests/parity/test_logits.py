"""Our logits are transformers' logits, over the whole grid (semantics: no eviction)."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch

import streamllm
from tests.checkpoints import Variant, make, respell
from tests.parity.grid import VARIANTS
from tests.parity.mended import mended

TOLERANCE = 5e-5  # times the spread of the logits, in float32


class Case:
    """One checkpoint of the grid on disk, and what transformers makes of it."""

    def __init__(self, variant: Variant, folder: Path) -> None:
        self.variant = variant
        self.folder = self.theirs = make(folder / "checkpoint", variant)
        if variant.disguise:
            self.folder = folder / "disguised"
            shutil.copytree(self.theirs, self.folder)
            respell(self.folder, variant.disguise)
        self.reference = cache(self._reference)

    def tokens(self, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        return torch.randint(0, self.variant.config["vocab_size"], (1, length), generator=generator)

    def _reference(self, length: int, dtype: torch.dtype, mend: bool = False) -> torch.Tensor:
        """transformers' logits, by a model that no earlier call has changed."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.theirs, dtype=dtype).eval()
        # Falcon's eager attention adds ALiBi twice, and MPT has no other.
        expected = "eager" if self.variant.config["model_type"] == "mpt" else "sdpa"
        assert model.config._attn_implementation == expected
        with torch.inference_mode(), mended() if mend else nullcontext():
            return model(self.tokens(length), use_cache=False).logits


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param.name))


def test_float32_as_transformers_rounds(case: Case) -> None:
    length = case.variant.length
    theirs = case.reference(length, torch.float32)
    model = streamllm.load_model(case.folder, dtype="float32", match_transformers=True)
    assert (model(case.tokens(length)) - theirs).abs().max() <= TOLERANCE * theirs.std()


def test_float32_as_the_config_says(case: Case) -> None:
    if case.variant.refused:
        with pytest.raises(streamllm.UnsupportedConfig, match=case.variant.refused):
            streamllm.load_model(case.folder)
        return
    length = 64
    theirs = case.reference(length, torch.float32, mend=case.variant.faulty)
    model = streamllm.load_model(case.folder, dtype="float32")
    assert (model(case.tokens(length)) - theirs).abs().max() <= TOLERANCE * theirs.std()


def test_bfloat16_is_no_further_than_transformers_is_from_itself(case: Case) -> None:
    length = case.variant.length
    exact = case.reference(length, torch.float32)
    theirs = case.reference(length, torch.bfloat16).float()
    model = streamllm.load_model(case.folder, dtype="bfloat16", match_transformers=True)
    ours = model(case.tokens(length)).float()
    assert (ours - theirs).abs().mean() <= (theirs - exact).abs().mean()
