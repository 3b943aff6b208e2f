"""What must hold on a GPU: the laws of streaming for every family, and fused steps equal to the modules."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import streamllm
from streamllm.cache import SinkCache
from tests.laws.families import tiny_model
from tests.laws.scenarios import VOCABULARY, error, feed, random_split, random_tokens, tiny_llama

if TYPE_CHECKING:
    from benchmark.gpu import Log

HALF = (torch.bfloat16, torch.float16)
# Of the standard deviation of the logits; half types: times the mean rounding of the CPU, or of the modules.
ALLOWED = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 2.0, torch.float16: 2.0}
ALLOWED_FUSED = {torch.float32: 1e-4, torch.bfloat16: 1.3, torch.float16: 1.3}


def family(name: str, dtype: torch.dtype) -> nn.Module:
    model = copy.deepcopy(tiny_llama() if name == "llama" else tiny_model(name))
    return model.to(dtype)


def check_family(log: Log, name: str) -> None:
    """One by one, in chunks and far away, against one chunk in float64 on the CPU; and dense, and ragged rows."""
    length, device = 28, log.device
    tokens = random_tokens(length)
    exact = family(name, torch.float64)
    wanted = feed(exact, SinkCache(exact, 4, 9), tokens, [length])
    for dtype, allowed in ALLOWED.items():
        on_cpu = family(name, dtype)
        model = copy.deepcopy(on_cpu).to(device)
        ways = {
            "one by one": feed(model, SinkCache(model, 4, 9), tokens.to(device)),
            "in chunks": feed(model, SinkCache(model, 4, 9), tokens.to(device), random_split(length, 3)),
            "at place 10^9": feed(model, SinkCache(model, 4, 9, origin=10**9), tokens.to(device), [length]),
        }
        rounding = 1.0
        if dtype in HALF:
            rounding = _mean(feed(on_cpu, SinkCache(on_cpu, 4, 9), tokens, [length]), wanted)
        for way, got in ways.items():
            got = got.cpu().double()
            value = _mean(got, wanted) / rounding if dtype in HALF else error(got, wanted)
            log.check(f"law: {name}, {dtype}, {way}", value, allowed)
    text = random_tokens(50, 2)
    model = copy.deepcopy(exact).to(device)
    log.check(f"dense: {name}", error(model(text.to(device)).cpu(), exact(text)), 1e-9)
    lengths = [3, 9, 1]
    rows = random_tokens(9, 3)
    got, want = (
        torch.cat(
            [one(rows.to(place), cache, lengths=lengths)[:, -1:], one(rows[:, :1].to(place), cache)]
        ).cpu()
        for one, place in ((model, device), (exact, "cpu"))
        for cache in [SinkCache(one, 2, 5, 3)]
    )
    log.check(f"ragged rows: {name}", error(got[3:], want[3:]), 1e-9)


def check_fused(log: Log, name: str, full: bool) -> None:
    """The fused step against the modules. `full`: also half types, rows at different places, and int8."""
    cases: list[dict[str, Any]] = [{"dtype": torch.float32}]
    if full:
        cases += [
            {"dtype": torch.bfloat16},
            {"dtype": torch.float32, "rows": 3, "ragged": True},
            {"dtype": torch.bfloat16, "rows": 18, "ragged": True},
            {"dtype": torch.bfloat16, "int8": True},
            {"dtype": torch.float16},
        ]
    for case in cases if log.device == "cuda" else cases[:1]:
        text = ", ".join(str(value) if key == "dtype" else f"{key} {value}" for key, value in case.items())
        log.attempt(
            f"fused {name}, {text}", lambda case=case, text=text: _check_case(log, name, text, **case)
        )


def _check_case(
    log: Log,
    name: str,
    text: str,
    dtype: torch.dtype,
    rows: int = 1,
    ragged: bool = False,
    int8: bool = False,
) -> None:
    device, quantize = log.device, "int8" if int8 else None
    model = family(name, dtype).to(device)
    exact = copy.deepcopy(model).cpu().double()
    if int8:
        from streamllm.models.linear import quantize as quantize_weights

        quantize_weights(model)
    compiled = streamllm.compile(copy.deepcopy(model), "cudagraphs" if device == "cuda" else "flat")
    caches = [SinkCache(one, 4, 20, rows, quantize=quantize) for one in (model, compiled)]
    exact_cache = SinkCache(exact, 4, 20, rows)
    outputs: list[list[Tensor]] = [[], [], []]
    models = (*zip((model, compiled), caches, strict=True), (exact, exact_cache))
    if ragged:
        start, lengths = random_tokens(30, rows), [1 + 7 * row % 30 for row in range(rows)]
        for one, cache in models:
            one(start.to(cache.device), cache, lengths=lengths)
    for part in random_tokens(46, rows, seed=1).split([1] * 30 + [5] + [1] * 11, 1):
        for got, (one, cache) in zip(outputs, models, strict=True):
            got.append(one(part.to(cache.device), cache).double().cpu())
    modules, fused, wanted = (torch.cat(got, 1) for got in outputs)
    value = error(fused, modules) if dtype == torch.float32 else _mean(fused, wanted) / _mean(modules, wanted)
    log.check(f"fused: {name}, {text}", value, ALLOWED_FUSED[dtype])
    if device == "cuda":
        log.check(f"fused: {name}, {text}, not fused", float(not compiled._fusable), 0)


def check_long(log: Log) -> None:
    """On CUDA. A wide window, 32 splits and 300 tokens: a race between splits would show."""
    if log.device != "cuda":
        return
    model = tiny_llama.__wrapped__(
        heads=8, kv_heads=2, dtype=torch.float32, width=256, mlp_width=704, head_dim=64, layers=2,
        vocab_size=VOCABULARY,
    ).to(log.device)  # fmt: skip
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data *= (32 / weight.shape[1]) ** 0.5
    for dtype in (torch.float32, torch.bfloat16):
        one = copy.deepcopy(model).to(dtype)
        exact = copy.deepcopy(one).double()
        compiled = streamllm.compile(copy.deepcopy(one), "cudagraphs")
        runs = []
        for each in (one, compiled, exact):
            cache = SinkCache(each, 4, 4092)
            tokens = random_tokens(4300, seed=2).to(log.device)
            each(tokens[:, :4000], cache, logits_to_keep=1)
            runs.append(torch.cat([each(part, cache) for part in tokens[:, 4000:].split(1, 1)], 1).double())
        modules, fused, wanted = runs
        value = (
            error(fused, modules) if dtype == torch.float32 else _mean(fused, wanted) / _mean(modules, wanted)
        )
        log.check(f"fused: 300 tokens at S+W 4096, {dtype}", value, ALLOWED_FUSED[dtype])


def _mean(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).abs().mean() / wanted.std())
