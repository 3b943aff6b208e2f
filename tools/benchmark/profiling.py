"""What `streamllm.generate` does for one token: synchronizations, launches and kernels."""

from __future__ import annotations

import time
from dataclasses import replace

from benchmark.ours import compiled_for, random_llama
from benchmark.spec import SINKS, Spec, random_tokens, synchronize

WARM_UP_TOKENS = 10


def counts_per_token(spec: Spec) -> dict[str, float]:
    """Calls per token by name, "kernels" per token, and "ms" per token measured without the profiler.

    On CUDA the loop synchronizes with one event per token. The device has already passed that event, or passes it
    while the next forward is in its queue. So cudaEventSynchronize is 1, and the other synchronizations are 0
    except those of the profiler. On a CPU, `_local_scalar_dense` counts reads of single numbers, which would
    synchronize on CUDA. It also counts reads of tensors that are on the host anyway.
    """
    import torch
    from torch.profiler import ProfilerActivity

    import streamllm

    torch.set_num_threads(spec.threads)
    model = random_llama(spec)
    cache = streamllm.SinkCache(model, SINKS, spec.window)
    prompt = random_tokens(replace(spec, batch=1), SINKS + spec.window)
    tokens = streamllm.generate(compiled_for(spec, model), prompt, cache, eos=[])
    for _ in range(WARM_UP_TOKENS):
        next(tokens)
    synchronize(spec)
    begin = time.perf_counter()
    for _ in range(spec.tokens):
        next(tokens)
    counts = {"ms": (time.perf_counter() - begin) / spec.tokens * 1e3}
    cuda = spec.device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(spec.tokens):
            next(tokens)
    for row in profile.key_averages():
        waits = row.key.endswith("Synchronize") or row.key in ("cudaMemcpy", "aten::nonzero")
        pageable = row.key.startswith("Memcpy") and "Pageable" in row.key
        launches = row.key.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync"))
        if waits or pageable or launches or row.key in ("aten::_local_scalar_dense", "aten::item"):
            counts[row.key] = row.count / spec.tokens
        elif row.device_type == torch.autograd.DeviceType.CUDA:
            counts["kernels"] = counts.get("kernels", 0.0) + row.count / spec.tokens
    return counts
