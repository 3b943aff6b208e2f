"""The checkpoints of the grid on disk, and transformers' logits for them."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

import streamllm
from tests.checkpoints import Variant, make, respell
from tests.parity.mended import mended

TOLERANCE = 5e-5  # of float32 logits, times their standard deviation


class Case:
    """One checkpoint of the grid on disk, and transformers' logits for it.

    Attributes:
        folder: the checkpoint that we load.
        theirs: the one that transformers loads: the same with a config that it can read.
        reference: (length, dtype, mend) -> transformers' logits; with `mend`, its faults are corrected.
    """

    def __init__(self, variant: Variant, folder: Path) -> None:
        self.variant = variant
        self.folder = self.theirs = make(folder / "checkpoint", variant)
        if variant.disguise:
            self.folder = folder / "disguised"
            shutil.copytree(self.theirs, self.folder)
            respell(self.folder, variant.disguise)
        self.reference = cache(self._reference)
        self._model = cache(self._load)

    def tokens(self, length: int) -> Tensor:
        """Random token ids [1, length]."""
        generator = torch.Generator().manual_seed(7)
        return torch.randint(0, self.variant.config["vocab_size"], (1, length), generator=generator)

    def _reference(self, length: int, dtype: torch.dtype, mend: bool = False) -> Tensor:
        model = deepcopy(self._model(dtype))  # some models remember the longest text so far
        with torch.inference_mode(), mended() if mend else nullcontext():
            return model(self.tokens(length), use_cache=False).logits

    def _load(self, dtype: torch.dtype) -> nn.Module:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.theirs, dtype=dtype).eval()
        # Falcon's eager attention adds ALiBi twice, so it must not be used; MPT has only eager.
        expected = "eager" if self.variant.config["model_type"] == "mpt" else "sdpa"
        assert model.config._attn_implementation == expected
        return model

    def distance(self, match_transformers: bool) -> float:
        """The largest difference of our float32 logits from theirs, in standard deviations of theirs.

        Without `match_transformers`, 64 tokens are compared, with transformers' faults corrected.
        """
        length = self.variant.length if match_transformers else 64
        theirs = self.reference(length, torch.float32, self.variant.faulty and not match_transformers)
        model = streamllm.load_model(self.folder, dtype="float32", match_transformers=match_transformers)
        return float((model(self.tokens(length)) - theirs).abs().max() / theirs.std())
