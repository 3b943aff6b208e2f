"""A model that was compiled and has generated can be trained, and generates with the new weights afterwards."""

from __future__ import annotations

import pytest
import torch

import streamllm

TOKENS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("generates_first", [True, False])
def test_training_after_generating(checkpoint, dtype, generates_first):
    model = streamllm.load_model(checkpoint, device="cpu", dtype=dtype)
    compiled = streamllm.compile(model, "flat")
    if generates_first:
        list(streamllm.generate(compiled, [5], max_new_tokens=60))
    assert not any(parameter.is_inference() for parameter in model.parameters())
    before = list(streamllm.generate(compiled, [5], max_new_tokens=20))
    model.requires_grad_(True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(TOKENS).float().logsumexp(-1).sum().backward()
    optimizer.step()
    model.eval().requires_grad_(False)
    after = list(streamllm.generate(compiled, [5], max_new_tokens=20))
    assert after != before
    if dtype == "float64":
        assert after == list(streamllm.generate(model, [5], max_new_tokens=20))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_weights_that_were_loaded_in_inference_mode(checkpoint, dtype):
    wanted = list(
        streamllm.generate(
            streamllm.load_model(checkpoint, device="cpu", dtype="float64"), [5], max_new_tokens=9
        )
    )
    with torch.inference_mode():
        model = streamllm.compile(streamllm.load_model(checkpoint, device="cpu", dtype=dtype), "flat")
        got = list(streamllm.generate(model, [5], max_new_tokens=9))
    assert got == wanted or dtype == "bfloat16"
    assert model.recordings
