"""The parts of tools/gpu_check.py: each runs in a process of its own, and writes rows to a file as they come."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import streamllm
from benchmark.gpu_laws import check_family, check_fused, check_long
from benchmark.ours import random_llama
from benchmark.spec import SINKS, SIZES, Spec
from streamllm.cache import SinkCache
from streamllm.compiled import triton_support
from tests.laws.families import CONFIGS

WORKERS = 12  # processes that compile kernels side by side
FAMILIES = ("llama", "gpt_neox", "falcon 7b", "falcon rw", "mpt storywriter", "qwen2, three windows", "qwen3")
PROFILED_KERNELS = 24  # those that take the most time
FULL = {"8B": 4092, "7B": 4092, "1B": 1020}


class Log:
    """Appends rows of one part to the file of results."""

    def __init__(self, path: Path, part: str, device: str) -> None:
        self.path, self.part, self.device = path, part, device

    def add(self, **row: Any) -> None:
        line = json.dumps({"part": self.part, **row})
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def check(self, what: str, value: float, allowed: float) -> None:
        self.add(what=what, value=value, allowed=allowed, ok=bool(value <= allowed))

    def check_time(self, what: str, ratio: float, allowed: float) -> None:
        """On a CPU, the tiny models' times mean nothing."""
        if self.device == "cuda":
            self.check(what, ratio, allowed)
        else:
            self.add(what=what, ratio=ratio)

    def time(self, place: str, system: str, ms: float, per_step: int, **more: Any) -> None:
        """ms of a step that takes in `per_step` tokens."""
        self.add(place=place, system=system, ms=ms, per_second=per_step / ms * 1e3, **more)

    def attempt(self, what: str, work: Callable[[], None]) -> None:
        """What fails is written down, and the rest goes on."""
        try:
            work()
        except Exception as error:
            where = traceback.format_exc(limit=-3)[:600]
            self.add(what=what, failed=f"{what}: {type(error).__name__}: {str(error)[:400]}", traceback=where)


def run(part: str, device: str, path: Path, arguments: str) -> None:
    log = Log(path, part, device)
    torch.backends.cuda.matmul.allow_tf32 = False
    warnings.showwarning = lambda message, *_: log.add(warning=str(message)[:600])
    torch.set_num_threads(1 if device == "cpu" or arguments else 8)
    with torch.no_grad():
        PARTS[part](log, arguments)


def smoke(log: Log, arguments: str) -> None:
    """The first minute on a GPU: do the kernels run, are they right, are they fast?"""
    log.add(machine=machine(log.device))
    check_fused(log, "llama", full=False)
    log.attempt("fused, long", lambda: check_long(log))
    decode(log, "1B", first=True)


def laws(log: Log, arguments: str) -> None:
    shared(log, arguments, ["llama", *CONFIGS], lambda name: check_family(log, name))


def fast(log: Log, arguments: str) -> None:
    """In processes side by side, because compiling the kernels takes a second each."""
    names = [*FAMILIES, *(name for name in CONFIGS if name not in FAMILIES)]
    shared(log, arguments, names, lambda name: check_fused(log, name, full=name in FAMILIES))


def shared(log: Log, arguments: str, names: Sequence[str], check: Callable[[str], None]) -> None:
    """Check every family, on CUDA in processes side by side, each with its share of the names."""
    if log.device == "cpu":
        names, arguments = names[:2], "0/1"
    if not arguments:
        spread(log, WORKERS)
        return
    worker, count = map(int, arguments.split("/"))
    for name in names[worker::count]:
        log.attempt(f"{log.part} {name}", lambda name=name: check(name))


def spread(log: Log, count: int) -> None:
    """Run the part in `count` processes, each with its share as an argument."""
    command = [
        sys.executable,
        sys.argv[0],
        "--part",
        log.part,
        "--device",
        log.device,
        "--out",
        str(log.path),
    ]
    children = [
        subprocess.Popen([*command, "--arguments", f"{worker}/{count}"], env=dict(os.environ))
        for worker in range(count)
    ]
    for child in children:
        if child.wait():
            log.add(failed=f"a process of this part ended with exit code {child.returncode}")


def decode(log: Log, size: str, first: bool = False) -> None:
    """first: only the limit and the fused kernels."""
    window = FULL[size] if log.device == "cuda" else 60
    model = random_model(size, log.device)
    place = f"{size}, S+W {SINKS + window}, bfloat16, batch 1"
    cache = filled(model, window, 1)
    log.time(place, "limit", limit_ms(read_bytes(model, cache), log.device), 1)
    fused = streamllm.compile(model, backend(log.device))
    at_start = step_ms(fused, cache)
    log.time(place, "fused kernels", at_start, 1)
    if first:
        return

    def torch_kernels() -> None:
        devices, triton_support.DEVICES = triton_support.DEVICES, ()
        try:
            log.time(
                place, "torch's kernels", step_ms(streamllm.compile(model, backend(log.device)), cache), 1
            )
        finally:
            triton_support.DEVICES = devices

    def far() -> None:
        times = {}
        for seen in (10**4, 10**6, 10**4, 10**6):
            times[seen] = min(times.get(seen, 1e9), step_ms(fused, filled(model, window, 1, seen=seen)))
        log.check_time(f"{size}: time of token 10^6 / of token 10^4", times[10**6] / times[10**4], 1.01)

    def filling() -> None:
        early = step_ms(fused, filled(model, window, 1, seen=100), tokens=32)
        log.time(f"{size}, window {window}, token 100", "fused kernels", early, 1)
        short = step_ms(fused, filled(model, 252, 1, seen=10**4))
        log.time(f"{size}, window 252, full", "fused kernels", short, 1)
        log.check_time(f"{size}: token 100 of a window of {window} / window of 252", early / short, 1.15)

    def int8_cache() -> None:
        cache = filled(model, window, 1, quantize="int8")
        name = place + ", int8 cache"
        log.time(name, "limit", limit_ms(read_bytes(model, cache), log.device), 1)
        log.time(name, "fused kernels", step_ms(fused, cache), 1)

    def int8_weights() -> None:
        from streamllm.models.linear import quantize

        quantize(model)
        name = place.replace("bfloat16", "int8 weights")
        log.time(name, "limit", limit_ms(read_bytes(model, cache), log.device), 1)
        ms = step_ms(streamllm.compile(model, backend(log.device)), cache)
        log.time(name, "fused kernels", ms, 1)
        log.add(what=f"{size}: bfloat16 / int8", ratio=at_start / ms)

    def kernels() -> None:
        profile(log, model, window, 1)

    # `torch_kernels` moves weights, so that the fused step would be recorded again behind it.
    more = {"8B": (kernels, int8_cache, torch_kernels, int8_weights), "7B": (int8_weights,)}
    for work in (filling, far, *more.get(size, (torch_kernels,))):
        log.attempt(f"{size} {work.__name__}", work)


def batch(log: Log, arguments: str) -> None:
    model = random_model("8B", log.device)
    small = log.device == "cpu"
    for rows, window in (
        ((64, 1020), (256, 1020), (32, 4092), (8, 4092)) if not small else ((3, 60), (18, 20))
    ):

        def one(rows: int = rows, window: int = window) -> None:
            place = f"8B, S+W {SINKS + window}, bfloat16, batch {rows}"
            cache = filled(model, window, rows)
            log.time(place, "limit", limit_ms(read_bytes(model, cache), log.device), rows)
            fused = streamllm.compile(model, backend(log.device))
            log.time(place, "fused kernels", step_ms(fused, cache, tokens=8, rounds=3), rows)
            if rows == 64:
                set_place(cache, [10**4 + 7 * row for row in range(rows)])
                ms = step_ms(fused, cache, tokens=8, rounds=3)
                log.time(place + ", rows at different places", "fused kernels", ms, rows)
                devices, triton_support.DEVICES = triton_support.DEVICES, ()
                set_place(cache, [10**4] * rows)
                ms = step_ms(streamllm.compile(model, backend(log.device)), cache, tokens=8, rounds=3)
                triton_support.DEVICES = devices
                log.time(place, "torch's kernels", ms, rows)

        log.attempt(f"batch {rows}", one)
        empty()
    log.attempt("profile, batch 64", lambda: profile(log, model, 1020, 64))


def profile(log: Log, model: nn.Module, window: int, rows: int) -> None:
    """Where the time of a token goes, kernel by kernel."""
    fused = streamllm.compile(model, backend(log.device))
    cache, tokens = filled(model, window, rows), 8
    step_ms(fused, cache, tokens=4, rounds=1)

    def work() -> None:  # twice as many tokens, because the first round is dropped
        step_ms(fused, cache, tokens=tokens // 2, rounds=1, warm=0)

    profile_kernels(log, f"batch {rows}", work, tokens)


def profile_kernels(log: Log, name: str, work: Callable[[], None], count: int) -> None:
    """The kernels of `work` that take the most time, per one of `count`."""
    if log.device == "cpu":
        return
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    with profiled(activities=[ProfilerActivity.CUDA]) as found:
        work()
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in events[:PROFILED_KERNELS]:
        log.add(kernel=f"{name}: {event.key[:70]}", calls=event.count / count,
                us=event.self_device_time_total / count)  # fmt: skip


def prefill(log: Log, arguments: str) -> None:
    size, small = "8B", log.device == "cpu"
    plain = random_model(size, log.device)
    model = streamllm.compile(plain, backend(log.device))
    window = 4092 if not small else 60
    for length, scored in (
        ((4096, False), (16384, False), (4096, True)) if not small else ((80, False), (80, True))
    ):
        cache = SinkCache(model, SINKS, window)
        tokens = torch.randint(
            SIZES[size]["vocab_size"] if not small else 256, (1, length), device=log.device
        )

        def one(
            length: int = length, scored: bool = scored, cache: SinkCache = cache, text: Any = tokens
        ) -> None:
            def work() -> None:
                cache.reset()
                for part in text.split(cache.chunk, 1) if scored else (text,):
                    model(part, cache, logits_to_keep=None if scored else 1)

            ms = event_ms(work, log.device, rounds=3)
            name = f"{size}, {'scoring' if scored else 'prefill'} of {length}"
            log.time(name, f"streamllm, chunk {cache.chunk}", ms, length)
            if not scored:
                profile_kernels(log, name, work, 1)
            if length == 4096 and not scored:
                check_chunks(log, plain, model, window, text)

        log.attempt(f"prefill {length}", one)
        empty()


def check_chunks(log: Log, plain: nn.Module, model: nn.Module, window: int, text: torch.Tensor) -> None:
    """The fused kernels of a prompt against the modules, in bfloat16, by the mean difference of the last logits."""
    wanted, got = (
        one(text, SinkCache(one, SINKS, window), logits_to_keep=1).float() for one in (plain, model)
    )
    log.check(
        "8B, prompt: fused kernels against modules, std",
        (float((got - wanted).abs().mean() / wanted.std())),
        0.1,
    )


def peers(log: Log, arguments: str) -> None:
    """transformers, in the settings of the other parts."""
    if log.device == "cpu":
        return
    try:
        import transformers  # noqa: F401
    except ImportError:
        log.add(failed="transformers is not installed")
        return
    from benchmark.peer_transformers import transformers as peer

    # Compiling a step of 32 layers takes 40 s, so that no more fit into the limit of this part.
    for size, task, kind in (("8B", "prefill", "dynamic"), ("8B", "decode", "static-compiled")):
        window = FULL[size]
        tokens = 4096 if task == "prefill" else 32
        spec = Spec(kind, task, size, "bfloat16", window, 1, 16, log.device, tokens)

        def one(spec: Spec = spec, kind: str = kind) -> None:
            work = peer(spec, kind)
            for _ in range(3):
                work()
            seconds = []
            for _ in range(4):
                begin = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - begin)
            ms = statistics.median(seconds) * 1e3
            if spec.task == "prefill":
                log.time(f"{spec.model}, prefill of 4096", "transformers, dense", ms, 4096)
            else:
                place = f"{spec.model}, S+W {SINKS + spec.window}, bfloat16, batch 1"
                log.time(place, "transformers, static cache, compiled", ms / spec.tokens, 1)

        log.attempt(f"transformers {size} {task}", one)
        torch._dynamo.reset()
        empty()


def tiles(log: Log, arguments: str) -> None:
    if log.device == "cuda":
        from benchmark.gpu_tiles import measure_tiles

        measure_tiles(log, arguments, WORKERS, spread)


PARTS: dict[str, Callable[[Log, str], None]] = {
    "smoke": smoke,
    "laws": laws,
    "fast": fast,
    "tiles": tiles,
    "decode-8b": lambda log, _: decode(log, "8B"),
    "decode-7b": lambda log, _: decode(log, "7B"),
    "decode-1b": lambda log, _: decode(log, "1B"),
    "batch": batch,
    "prefill": prefill,
    "peers": peers,
}


def backend(device: str) -> str:
    return "cudagraphs" if device == "cuda" else "flat"


def machine(device: str) -> dict[str, Any]:
    found = {"torch": torch.__version__, "device": device}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        try:
            import triton

            found["triton"] = triton.__version__
        except ImportError:
            found["triton"] = "not installed"
    return found


def random_model(size: str, device: str) -> nn.Module:
    spec = Spec("ours", "decode", size, "bfloat16", 0, 1, 1, device, 1)
    return random_llama(spec if device == "cuda" else replace(spec, model="tiny", dtype="float32"))  # type: ignore[no-any-return]


def filled(
    model: nn.Module, window: int, rows: int, seen: int = 10**4, quantize: str | None = None
) -> SinkCache:
    """A cache as after `seen` tokens, with random keys and values."""
    cache = SinkCache(model, SINKS, window, rows, quantize=quantize)
    for tensor in cache.tensors():
        if tensor.dtype == torch.int8:
            tensor.random_(-127, 128)
        else:
            tensor.normal_(0, 0.02 if tensor.shape[-1] == 1 else 1.0)
    set_place(cache, [seen] * rows)
    return cache


def set_place(cache: SinkCache, seen: list[int]) -> None:
    """As if the streams had seen so many tokens: a benchmark needs no prompt."""
    cache._state = seen, *cache._state[1:]  # type: ignore[assignment]


def read_bytes(model: Any, cache: SinkCache) -> int:
    """What one token must read: the weights without the embedding, and what the cache holds."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    tensors.pop(id(model.embed.weight))
    return sum(tensor.nbytes for tensor in tensors.values()) + cache.nbytes


def step_ms(model: nn.Module, cache: SinkCache, tokens: int = 24, rounds: int = 5, warm: int = 3) -> float:
    """ms per token of greedy decoding: the median of the rounds."""
    device = cache.device.type
    if device == "cpu":
        tokens, rounds = 3, 1

    def decode(count: int) -> None:
        token = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=cache.device)
        for _ in range(count):
            token = model(token, cache, logits_to_keep=1)[:, -1].argmax(-1, keepdim=True)

    with torch.inference_mode():
        if warm:
            decode(warm)
        return event_ms(lambda: decode(tokens), device, rounds) / tokens


def event_ms(work: Callable[[], None], device: str, rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        wait(device)
        begin = time.perf_counter()
        work()
        wait(device)
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[1:])


def limit_ms(nbytes: int, device: str) -> float:
    """The time of a plain read of so many bytes, at the speed of the fastest of three reductions."""
    size = (1 << 30) if device == "cuda" else 1 << 24
    parts = [torch.ones(size // 8, dtype=torch.int64, device=device) for _ in range(4)]
    readers: list[Callable[[torch.Tensor], Any]] = [
        lambda part: part.sum(),
        lambda part: part.view(torch.float32).sum(),
        lambda part: part.view(torch.int32).max(),
    ]
    best = min(
        event_ms(lambda reader=reader: [reader(part) for part in parts] and None, device, 5)
        for reader in readers
    )
    return best / (4 * size) * nbytes


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def empty() -> None:
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
