"""Nothing depends on torch's process-wide defaults: type, device, gradients, determinism."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from pathlib import Path

import pytest
import torch

import streamllm
from streamllm.cache import SinkCache
from streamllm.models import alibi, attention, linear, rotary
from tests.laws.families import tiny_model
from tests.laws.scenarios import ROPES, random_tokens, tiny_llama
from tests.unit.creation_calls import unspecified

ROOT = Path(__file__).parents[2]
# Loop and Stream are changed elsewhere; a parameter of a module that a user builds takes torch's defaults.
EXEMPT = {
    "models/base.py: torch.empty",
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


HOSTILE = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "meta device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "deterministic": deterministic,
}


def forget_constants() -> None:
    """Empty the caches of constants, which would hide a default that was in force when they were made."""
    for module in (alibi, attention, linear, rotary):
        for value in vars(module).values():
            if isinstance(value, _lru_cache_wrapper):
                value.cache_clear()


@pytest.fixture(autouse=True)
def without_constants() -> Iterator[None]:
    forget_constants()
    yield
    forget_constants()


def float32_model(name: str) -> torch.nn.Module:
    return copy.deepcopy(tiny_model(name)).to(torch.float32)


def logits_of_every_path(model: torch.nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Dense, in chunks past the window, token by token, ragged, in int8, and compiled."""
    results = [model(tokens)]
    for quantize in (None, "int8"):
        cache = SinkCache(model, 2, 6, 2, chunk=4, quantize=quantize)
        results.append(model(tokens[:, :11], cache))
        results.append(model(tokens[:, 11:13], cache, lengths=[2, 0], logits_to_keep=2))
        results.append(model(tokens[:, 13:14], cache))
        restored = SinkCache(model, 2, 6, 2, quantize=quantize)
        restored.load_state_dict(cache.state_dict())
        results.append(model(tokens[:, 14:15], restored))
        restored.reset([1])
    flat, cache = streamllm.compile(model, "flat"), SinkCache(model, 2, 6, 2)
    results += [flat(token[:, None], cache) for token in tokens.unbind(1)[:10]]
    return [result.clone() for result in results]


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=list(HOSTILE))
@pytest.mark.parametrize("name", ["gpt_neox", "falcon 7b", "mpt", *(f"rope {name}" for name in ROPES)])
def test_every_path_gives_the_same_logits(name, hostile):
    if name.startswith("rope "):
        model = tiny_llama(name.removeprefix("rope "), dtype=torch.float32)
    else:
        model = float32_model(name)
    tokens = random_tokens(16, rows=2)
    with torch.no_grad():
        wanted = logits_of_every_path(model, tokens)
        forget_constants()
        with hostile():
            got = logits_of_every_path(model, tokens)
        later = logits_of_every_path(model, tokens)  # nothing of it was kept
    for one, other, third in zip(wanted, got, later, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=list(HOSTILE))
def test_a_checkpoint_is_loaded_and_generates(checkpoint, hostile):
    def generated() -> list[int]:
        model = streamllm.load_model(checkpoint, device="cpu")
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        cache = SinkCache(model, 2, 6)
        settings = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 3, "eos": []}
        return list(streamllm.generate(model, [1, 5, 9], cache, max_new_tokens=12, **settings))

    wanted = generated()
    with hostile():
        assert generated() == wanted


@pytest.mark.parametrize("room", ["models", "weights", "streamllm"])
def test_every_tensor_is_made_with_a_type_and_a_device(room):
    found = []
    for path in sorted((ROOT / room).rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        found += [
            f"{where}: {call}" for call in unspecified(path)
            if f"{where}: {call.split(': ')[1].split()[0]}" not in EXEMPT
        ]  # fmt: skip
    assert found == []


def test_the_search_finds_calls_without_a_type_or_a_device(tmp_path):
    source = tmp_path / "source.py"
    source.write_text("torch.arange(3)\ntorch.zeros(3, dtype=x, device=y)\ntorch.tensor(1.0, device=y)\n")
    assert list(unspecified(source)) == [
        "source.py:1: torch.arange without device and dtype",
        "source.py:3: torch.tensor without dtype",
    ]


def test_constants_made_in_inference_mode_can_be_used_in_training():
    for name in ("mpt", "gpt_neox"):
        model = float32_model(name)
        with torch.inference_mode():
            model(random_tokens(9))
        model.requires_grad_(True)
        try:
            model(random_tokens(9)).sum().backward()
            assert all(weight.grad is not None for weight in model.parameters())
        finally:
            model.requires_grad_(False)
            model.zero_grad()
