"""How fast it is: our models beside what one would take instead, and beside the limit of the machine.

    python tools/bench.py decode --model M --window 1024 --threads 1 2
    python tools/bench.py decode score --model S --dtype float32 bfloat16 --systems ours compiled dynamic
    python tools/bench.py load --model M
    python tools/bench.py memory --model S M --dtype float32 bfloat16 int8 --systems ours compiled inductor
    python tools/bench.py decode --device cuda --model 7B --dtype bfloat16 --window 4092 \\
        --systems limit ours cudagraphs static static-compiled
    python tools/bench.py decode --device cuda --model 7B --dtype bfloat16 --systems ours cudagraphs --profile
    python tools/bench.py decode --streaming-llm ~/peer       # ~/peer/bin/python, with its package importable

The limit is the fastest plain read of the bytes that one token needs: the weights but for the embedding,
and the cache. It is measured in the same run, with the same threads. Every system is a process of its own;
all are set up first, then measured in turn, round after round, so that a busy neighbour disturbs all alike
(on a CPU: on an accelerator, which has no neighbours and no room, one comes after the other).
What is printed is the median of the rounds, with the lowest and the highest, and the ratio to the limit.

KVStore is what a process holds that has loaded a checkpoint and decodes, beside what it must hold: the
runtime, measured in the same process when a tiny model has been through all of it, the weights and the cache.

Weights are random: nothing here depends on their values. Streams stand past eviction when the clock starts.
This file runs in the environments of the peers, too: the top of it imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 128, "vocab_size": 256},
    "S": {"width": 256, "layers": 8, "heads": 4, "kv_heads": 4, "mlp_width": 688, "vocab_size": 4096},
    "M": {"width": 768, "layers": 12, "heads": 12, "kv_heads": 12, "mlp_width": 2048, "vocab_size": 32000},
    "7B": {"width": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "mlp_width": 11008, "vocab_size": 32000},
}
SINKS = 4


@dataclass(frozen=True)
class Spec:
    """One cell of the table: what a worker is to build and to do."""

    system: str
    task: str
    model: str
    dtype: str
    window: int
    batch: int
    threads: int
    device: str
    tokens: int  # decoded, scored or prefilled per round

    @property
    def place(self) -> str:
        text = f"{self.task} {self.model} {self.dtype} W={self.window} batch={self.batch}"
        return f"{text} {self.device if self.device != 'cpu' else f'{self.threads} threads'}"


# ---------------------------------------------------------------- the systems (run inside the workers)
# Each takes a Spec and returns what is measured: a function without arguments. A round is one call.

Round = Callable[[], None]


def limit(spec: Spec) -> Round:
    """The bytes of the weights and of the cache, read once, in the way that was fastest."""
    import torch

    itemsize = 1 if spec.dtype == "int8" else getattr(torch, spec.dtype).itemsize
    kept = 2 if spec.dtype == "int8" else itemsize
    weights, per_token = _counts(spec)
    count = weights * itemsize + spec.batch * per_token * (SINKS + spec.window) * kept
    layers = SIZES[spec.model]["layers"] + 1
    # Ones: zeros that nobody has written to stand nowhere in memory.
    parts = [torch.ones(count // layers // 8, dtype=torch.int64, device=spec.device) for _ in range(layers)]
    readers = [
        lambda part: part.view(torch.float32).sum(),
        lambda part: part.sum(),
        lambda part: part.view(torch.int32).max(),
        lambda part: torch.dot(
            part.view(torch.float32)[: part.numel()], part.view(torch.float32)[part.numel() :]
        ),
    ]

    def pass_over(reader: Any, times: int) -> None:
        for _ in range(times):
            for part in parts:
                reader(part)
        _wait(spec)  # an accelerator works through all of them without a word from here

    def seconds(reader: Any) -> float:
        begin = time.perf_counter()
        pass_over(reader, 1)
        return time.perf_counter() - begin

    best = min(readers, key=lambda reader: min(seconds(reader) for _ in range(5)))
    return lambda: pass_over(best, spec.tokens)


OURS = {"ours": None, "compiled": "flat", "inductor": "inductor", "cudagraphs": "cudagraphs"}  # and backends


def ours(spec: Spec) -> Round:
    """This library, as `streamllm.load` leaves a model; or with `streamllm.compile` around it."""
    import torch

    import streamllm

    model: Any = _our_model(spec)
    # On an accelerator the scores of a chunk, [B, H, chunk, K] in float32, must fit beside a large batch.
    chunk = 512 if spec.device == "cpu" else max(32, 512 // spec.batch)
    cache = streamllm.SinkCache(model, SINKS, spec.window, spec.batch, chunk)
    backend = OURS[spec.system]
    if backend:
        model = streamllm.compile(model, backend=backend)
    text = _text(spec, SINKS + spec.window + spec.tokens)
    with torch.inference_mode():
        model(text, cache, logits_to_keep=1)

    def decode() -> None:
        with torch.inference_mode():
            token = text[:, :1]
            for _ in range(spec.tokens):
                token = model(token, cache, logits_to_keep=1)[:, -1].argmax(-1, keepdim=True)
        _wait(spec)

    def score() -> None:
        with torch.inference_mode():
            for part in text[:, : spec.tokens].split(cache.chunk, 1):
                model(part, cache)
        _wait(spec)

    def prefill() -> None:
        cache.reset()
        with torch.inference_mode():
            model(text[:, : spec.tokens], cache, logits_to_keep=1)
        _wait(spec)

    return {"decode": decode, "score": score, "prefill": prefill}[spec.task]


def transformers(spec: Spec, kind: str) -> Round:
    """transformers with one of its caches: dynamic or static, neither of which evicts; or the sliding one.

    "static-compiled" is what its own generate does with a static cache on CUDA: prefill as it is, then the
    forward through torch.compile, with CUDA graphs.
    """
    import torch
    from transformers import DynamicCache, LlamaForCausalLM, MistralForCausalLM, StaticCache

    model = _their_model(spec, MistralForCausalLM if kind == "sliding" else LlamaForCausalLM)
    full = SINKS + spec.window
    text = _text(spec, full + spec.tokens)
    places = [torch.tensor([[full - spec.tokens + i]], device=spec.device) for i in range(spec.tokens)]
    one: Any = model
    if kind == "static-compiled":
        one = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def fresh() -> Any:
        if kind.startswith("static"):
            return StaticCache(config=model.config, max_cache_len=max(full, spec.tokens))
        return DynamicCache(config=model.config) if kind == "sliding" else DynamicCache()

    def decode() -> None:  # the last `tokens` of S + W: it never gets a longer cache than ours
        token = text[:, :1]
        with torch.inference_mode():
            for i in range(spec.tokens):
                torch.compiler.cudagraph_mark_step_begin()
                out = one(token, past_key_values=state["cache"], use_cache=True, position_ids=places[i])
                token = out.logits[:, -1].argmax(-1, keepdim=True)
            if kind == "dynamic":
                state["cache"].crop(-spec.tokens)
            elif kind.startswith("static"):
                for layer in state["cache"].layers:
                    layer.cumulative_length -= spec.tokens
        _wait(spec)

    def filled() -> Any:
        cache = fresh()
        with torch.inference_mode():
            model(text[:, : full - spec.tokens], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def prefill() -> None:
        with torch.inference_mode():
            model(text[:, : spec.tokens], past_key_values=fresh(), use_cache=True, logits_to_keep=1)
        _wait(spec)

    state: dict[str, Any] = {}
    if spec.task == "decode":
        state["cache"] = filled()
    return {"decode": decode, "prefill": prefill}[spec.task]


def streaming_llm(spec: Spec, package: str) -> Round:
    """mit-han-lab/streaming-llm or attention_sinks, in the environment given: a loop of single tokens."""
    import torch
    from transformers import LlamaForCausalLM

    text = _text(spec, SINKS + spec.window + 8)
    state: dict[str, Any] = {"past": None}
    if package == "attention-sinks":
        from attention_sinks import LlamaForCausalLM as Sinking

        with tempfile.TemporaryDirectory() as folder:  # it patches what it loads, and nothing else
            _their_model(spec, LlamaForCausalLM).save_pretrained(folder)
            model = Sinking.from_pretrained(
                folder, attention_sink_size=SINKS, attention_sink_window_size=spec.window - 1,
                torch_dtype=getattr(torch, spec.dtype),
            ).eval()  # fmt: skip
        evict = None
    else:
        from streaming_llm.enable_streaming_llm import enable_streaming_llm

        model = _their_model(spec, LlamaForCausalLM)
        evict = enable_streaming_llm(model, start_size=SINKS, recent_size=spec.window - 1)

    def step(token: Any) -> Any:
        out = model(token, past_key_values=state["past"], use_cache=True)
        state["past"] = out.past_key_values if evict is None else evict(out.past_key_values)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def decode() -> None:
        token = text[:, :1]
        with torch.inference_mode():
            for _ in range(spec.tokens):
                token = step(token)
        _wait(spec)

    with torch.inference_mode():
        step(text[:, : SINKS + spec.window - 1])
        for _ in range(3):
            step(text[:, :1])
    return decode  # scoring is the same loop: their one exact way


def llama_cpp(spec: Spec) -> Round:
    """llama.cpp through llama-cpp-python. Past the end of its context it evicts as we do (float32 only)."""
    import llama_cpp

    size = SIZES[spec.model]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.gguf")
        _write_gguf(path, spec)
        llama = llama_cpp.Llama(
            path, n_ctx=SINKS + spec.window + spec.tokens + 8, n_threads=spec.threads, n_batch=512,
            n_threads_batch=spec.threads, n_gpu_layers=0, use_mmap=False, verbose=False,
            type_k=0 if spec.dtype == "float32" else 1, type_v=0 if spec.dtype == "float32" else 1,
        )  # fmt: skip
    full = SINKS + spec.window
    llama.eval([i % size["vocab_size"] for i in range(full - spec.tokens)])
    start = llama.n_tokens

    def decode() -> None:
        for i in range(spec.tokens):
            llama.eval([i])
        llama.n_tokens = start  # the next eval drops what stands behind

    return decode


SYSTEMS: dict[str, Callable[[Spec], Round]] = {
    "limit": limit,
    **dict.fromkeys(OURS, ours),
    "dynamic": lambda spec: transformers(spec, "dynamic"),
    "static": lambda spec: transformers(spec, "static"),
    "static-compiled": lambda spec: transformers(spec, "static-compiled"),
    "sliding": lambda spec: transformers(spec, "sliding"),
    "streaming-llm": lambda spec: streaming_llm(spec, "streaming-llm"),
    "attention-sinks": lambda spec: streaming_llm(spec, "attention-sinks"),
    "llama-cpp": llama_cpp,
}
PEERS = ("streaming-llm", "attention-sinks", "llama-cpp")  # in environments of their own


def _counts(spec: Spec) -> Any:
    """Numbers read per token: in the weights, and in the cache for each token held."""
    size = SIZES[spec.model]
    C, head = size["width"], size["width"] // size["heads"]
    attention = C * C * 2 + C * size["kv_heads"] * head * 2
    weights = size["layers"] * (attention + 3 * C * size["mlp_width"]) + C * size["vocab_size"]
    return weights, size["layers"] * size["kv_heads"] * head * 2


def _our_model(spec: Spec) -> Any:
    """A random Llama in the library's own module, arranged as the loader arranges it."""
    import torch

    from streamllm.models import linear as layers
    from streamllm.models import llama
    from streamllm.models.rotary import Rope

    size = SIZES[spec.model]
    head = size["width"] // size["heads"]
    config = llama.Config(
        **size, head_dim=head, rope=Rope(10000.0, head), trained_length=1 << 20, norm_eps=1e-5,
        activation="silu", attention_bias=False, mlp_bias=False, tied=False,
    )  # fmt: skip
    dtype = torch.bfloat16 if spec.dtype == "int8" else getattr(torch, spec.dtype)
    with torch.device("meta"):
        model = llama.Model(config).to(dtype)
    model = model.to_empty(device=spec.device).eval().requires_grad_(False)
    generator = torch.Generator(spec.device).manual_seed(0)
    for weight in model.parameters():
        weight.data.normal_(1.0 if weight.dim() == 1 else 0.0, 0.02, generator=generator)
    if spec.dtype == "int8":
        layers.quantize(model)
    layers.arrange(model)
    return model


def _their_model(spec: Spec, kind: Any) -> Any:
    import torch

    size, full = SIZES[spec.model], SINKS + spec.window
    config = kind.config_class(
        vocab_size=size["vocab_size"], hidden_size=size["width"], intermediate_size=size["mlp_width"],
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"], max_position_embeddings=1 << 16,
    )  # fmt: skip
    if hasattr(config, "sliding_window"):
        config.sliding_window = full
    torch.set_default_dtype(getattr(torch, spec.dtype))
    # A large model is drawn where it will be: a CPU takes minutes for 7 billion numbers.
    with contextlib.nullcontext() if spec.device == "cpu" else torch.device(spec.device):
        model = kind(config).eval().requires_grad_(False).to(spec.device)
    torch.set_default_dtype(torch.float32)
    return model


def _write_gguf(path: str, spec: Spec) -> None:
    import gguf
    import numpy as np

    size = SIZES[spec.model]
    C, head = size["width"], size["width"] // size["heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1 << 16)
    writer.add_embedding_length(C)
    writer.add_block_count(size["layers"])
    writer.add_feed_forward_length(size["mlp_width"])
    writer.add_head_count(size["heads"])
    writer.add_head_count_kv(size["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(size["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    random = np.random.default_rng(0)
    kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "Q8_0"}[spec.dtype]
    kind = getattr(gguf.GGMLQuantizationType, kind)

    def add(name: str, *shape: int) -> None:
        values = random.standard_normal(shape, dtype=np.float32) * 0.02
        if len(shape) == 1:
            writer.add_tensor(name, values + 1)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", size["vocab_size"], C)
    add("output_norm.weight", C)
    add("output.weight", size["vocab_size"], C)
    for n in range(size["layers"]):
        add(f"blk.{n}.attn_norm.weight", C)
        add(f"blk.{n}.ffn_norm.weight", C)
        add(f"blk.{n}.attn_q.weight", C, C)
        add(f"blk.{n}.attn_k.weight", size["kv_heads"] * head, C)
        add(f"blk.{n}.attn_v.weight", size["kv_heads"] * head, C)
        add(f"blk.{n}.attn_output.weight", C, C)
        add(f"blk.{n}.ffn_gate.weight", size["mlp_width"], C)
        add(f"blk.{n}.ffn_up.weight", size["mlp_width"], C)
        add(f"blk.{n}.ffn_down.weight", C, size["mlp_width"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _text(spec: Spec, length: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    vocabulary = SIZES[spec.model]["vocab_size"]
    return torch.randint(vocabulary, (spec.batch, length), generator=generator).to(spec.device)


def _wait(spec: Spec) -> None:
    if spec.device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


# ---------------------------------------------------------------- one worker


def work(spec: Spec) -> None:
    """Set up, then one round for each line that comes in; JSON lines go out."""
    out = os.fdopen(os.dup(1), "w")  # what a peer prints must not stand among the answers
    os.dup2(2, 1)
    try:
        with contextlib.suppress(ImportError):
            import torch

            torch.set_num_threads(spec.threads)
        run = SYSTEMS[spec.system](spec)
        for _ in range(3):
            run()
        answer: dict[str, Any] = {"ready": True}
    except Exception as error:
        answer = {"failed": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), file=out, flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        run()
        print(json.dumps({"seconds": time.perf_counter() - begin}), file=out, flush=True)


class Worker:
    """A process that was set up to run one Spec."""

    def __init__(self, spec: Spec, python: str, path: str | None = None) -> None:
        self.spec = spec
        self.seconds: list[float] = []
        threads = str(spec.threads)
        env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TQDM_DISABLE": "1"}
        if path:
            env["PYTHONPATH"] = path
        self.process = subprocess.Popen(
            [python, __file__, "--worker", json.dumps(asdict(spec))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip
        self.failed: str | None = None
        self._answer()

    def round(self) -> None:
        if self.failed is None:
            assert self.process.stdin is not None
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            self.seconds += [answer["seconds"]] if (answer := self._answer()) else []

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            said = self.process.stderr.read().strip().splitlines()
            line = json.dumps({"failed": said[-1] if said else "ended without a word"})
        answer = json.loads(line)
        self.failed = answer.get("failed")
        return answer  # type: ignore[no-any-return]


# ---------------------------------------------------------------- who waits for whom


def profiled(spec: Spec) -> dict[str, float]:
    """What `streamllm.generate` does for one token: host calls that wait, launches, kernels; ms unprofiled.

    On CUDA one event is waited for per token, which the device has long passed or will pass with the next
    forward in its queue: cudaEventSynchronize 1, the other waits 0 but for the profiler's own. On a CPU
    `_local_scalar_dense` stands in for them; it counts numbers read from the host's own tensors, too.
    """
    import torch
    from torch.profiler import ProfilerActivity

    import streamllm

    torch.set_num_threads(spec.threads)
    model: Any = _our_model(spec)
    cache = streamllm.SinkCache(model, SINKS, spec.window)
    backend = OURS[spec.system]
    if backend:
        model = streamllm.compile(model, backend)
    prompt = _text(replace(spec, batch=1), SINKS + spec.window)
    said = streamllm.generate(model, prompt, cache, eos=[])
    for _ in range(10):
        next(said)
    _wait(spec)
    begin = time.perf_counter()
    for _ in range(spec.tokens):
        next(said)
    counts = {"ms": (time.perf_counter() - begin) / spec.tokens * 1e3}
    cuda = spec.device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(spec.tokens):
            next(said)
    for row in profile.key_averages():
        waits = row.key.endswith("Synchronize") or row.key in ("cudaMemcpy", "aten::nonzero")
        pageable = row.key.startswith("Memcpy") and "Pageable" in row.key
        launches = row.key.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync"))
        if waits or pageable or launches or row.key in ("aten::_local_scalar_dense", "aten::item"):
            counts[row.key] = row.count / spec.tokens
        elif row.device_type == torch.autograd.DeviceType.CUDA:
            counts["kernels"] = counts.get("kernels", 0.0) + row.count / spec.tokens
    return counts


# ---------------------------------------------------------------- load and import


def load_times(sizes: Sequence[str], dtypes: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Seconds: reading the file plainly and loading it, from the disk and from memory; imports; to a first token."""
    rows = []
    for size in sizes:
        for dtype in dtypes:
            if dtype == "int8":
                continue
            with tempfile.TemporaryDirectory() as folder:
                _python(_WRITE, folder, json.dumps(SIZES[size]), dtype)
                file = Path(folder) / "model.safetensors"
                times: dict[tuple[str, str], list[float]] = {}
                for _ in range(rounds):
                    for place in ("disk", "memory"):
                        for code in (_READ, _LOAD):
                            if place == "disk":
                                _forget(file)
                            times.setdefault((place, code), []).append(float(_python(code, folder)))
                for place in ("disk", "memory"):
                    what, reads = f"load {size} {dtype} from {place}", times[place, _READ]
                    rows.append(_row(what, "plain read", reads, nbytes=file.stat().st_size))
                    rows.append(_row(what, "streamllm.load_model", times[place, _LOAD], reads))
    imports: dict[str, list[float]] = {"torch": [], "streamllm": []}
    first = []
    for _ in range(rounds):
        for name, spent in imports.items():
            spent.append(float(_python(_IMPORT, name)))
        with contextlib.suppress(RuntimeError):  # a tree without the embedded checkpoint
            first.append(float(_python(_FIRST)))
    rows.append(_row("import", "torch", imports["torch"]))
    rows.append(_row("import", "streamllm", imports["streamllm"], imports["torch"]))
    if first:
        rows.append(_row("first token", "embedded checkpoint, after import", first))
    return rows


def _forget(file: Path) -> None:
    """Have the file read from the disk next time."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.strip().rpartition("\n")[2]


_WRITE = """
import json, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
folder, size, dtype = sys.argv[1], json.loads(sys.argv[2]), getattr(torch, sys.argv[3])
config = LlamaConfig(
    vocab_size=size["vocab_size"], hidden_size=size["width"], intermediate_size=size["mlp_width"],
    num_hidden_layers=size["layers"], num_attention_heads=size["heads"],
    num_key_value_heads=size["kv_heads"])
LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
"""
_READ = """
import sys, time
buffer = bytearray(1 << 24)
begin = time.perf_counter()
with open(sys.argv[1] + "/model.safetensors", "rb", buffering=0) as file:
    while file.readinto(buffer):
        pass
print(time.perf_counter() - begin)
"""
_LOAD = """
import sys, time
import streamllm
begin = time.perf_counter()
model = streamllm.load_model(sys.argv[1], device="cpu")
print(time.perf_counter() - begin)
"""
_IMPORT = """
import importlib, sys, time
begin = time.perf_counter()
importlib.import_module(sys.argv[1])
print(time.perf_counter() - begin)
"""
_FIRST = """
import time
import streamllm
begin = time.perf_counter()
model, tokenizer = streamllm.load()
next(streamllm.Stream(model, tokenizer).generate("def "))
print(time.perf_counter() - begin)
"""


# ---------------------------------------------------------------- memory

DECODED = (200, 2000)  # tokens after which one looks


def memory_rows(cells: Sequence[Spec]) -> Iterator[dict[str, Any]]:
    """One row for each cell: bytes held while decoding, and how much more than what must be held."""
    with tempfile.TemporaryDirectory() as folder:
        for spec in cells:
            yield _held(spec, folder)


def _held(spec: Spec, folder: str) -> dict[str, Any]:
    stored = "bfloat16" if spec.dtype == "int8" else spec.dtype
    for size in ("tiny", spec.model):
        if not os.path.exists(f"{folder}/{size}/{stored}"):
            _python(_WRITE, f"{folder}/{size}/{stored}", json.dumps(SIZES[size]), stored)
    env = {**os.environ, "OMP_NUM_THREADS": str(spec.threads), "MKL_NUM_THREADS": str(spec.threads)}
    folders = [f"{folder}/{size}/{stored}" for size in ("tiny", spec.model)]
    command = [sys.executable, __file__, "--memory", json.dumps(asdict(spec)), *folders]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    row = {"place": spec.place, **asdict(spec)}
    if done.returncode:
        return {**row, "failed": done.stderr.strip().rpartition("\n")[2]}
    held = json.loads(done.stdout)
    must = held["runtime"] + held["weights"] + held["cache"]
    return {**row, **held, "ratio": max(held["resident"]) / must}


def remember(spec: Spec, tiny: str, folder: str) -> dict[str, Any]:
    """Run in a process of its own: a stream past eviction by a tiny model, then by the one that is asked for."""
    import torch
    from flat import resident_bytes

    import streamllm

    torch.set_num_threads(spec.threads)
    backend = OURS[spec.system]
    text = _text(replace(spec, model="tiny"), SINKS + spec.window)
    quantize = "int8" if spec.dtype == "int8" else None

    def decode(folder: str, stops: Sequence[int]) -> dict[str, Any]:
        model: Any = streamllm.load_model(folder, device="cpu", quantize=quantize)
        cache = streamllm.SinkCache(model, SINKS, spec.window, spec.batch)
        if backend:
            model = streamllm.compile(model, backend=backend)
        resident = []
        with torch.inference_mode():
            token = model(text, cache, logits_to_keep=1)[:, -1].argmax(-1, keepdim=True)
            for count in range(1, max(stops) + 1):
                token = model(token, cache, logits_to_keep=1)[:, -1].argmax(-1, keepdim=True)
                if count in stops:
                    resident.append(resident_bytes())
        tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
        weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return {"weights": weights, "cache": cache.nbytes, "resident": resident}

    runtime = decode(tiny, [20])["resident"][0]
    return {"runtime": runtime, **decode(folder, DECODED)}


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, in MB."""
    after = " | ".join(f"after {count:,} tokens" for count in DECODED)
    lines = [f"| what | system | runtime | weights | cache | {after} | × their sum |", "|---" * 8 + "|"]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['place']} | {row['system']} | failed: {row['failed']} | | | | | |")
            continue
        held = [row["runtime"], row["weights"], row["cache"], *row["resident"]]
        numbers = " | ".join(f"{nbytes / 1e6:.1f}" for nbytes in held)
        lines.append(f"| {row['place']} | {row['system']} | {numbers} | {row['ratio']:.3f} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- tables


def _row(
    place: str, system: str, seconds: Sequence[float], against: Sequence[float] = (), **more: Any
) -> dict[str, Any]:
    times = sorted(seconds)
    row = {"place": place, "system": system, "median": statistics.median(times), "low": times[0],
           "high": times[-1], "rounds": len(times), **more}  # fmt: skip
    if against:
        row["ratio"] = row["median"] / statistics.median(against)
    return row


def measured(workers: Sequence[Worker]) -> Iterator[dict[str, Any]]:
    """One row for each worker of a cell, in seconds per token (of each stream), and beside the limit."""
    bounds = [worker.seconds for worker in workers if worker.spec.system == "limit"]
    for worker in workers:
        spec = worker.spec
        if worker.failed or not worker.seconds:
            yield {"place": spec.place, "system": spec.system, "failed": worker.failed}
            continue
        each = [seconds / spec.tokens for seconds in worker.seconds]
        bound = [seconds / spec.tokens for seconds in bounds[0]] if bounds and spec.task == "decode" else ()
        yield {**asdict(spec), **_row(spec.place, spec.system, each, bound)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown. Decoding in ms per token, reading in tokens per second, loading in ms."""
    lines = [
        "| what | system | median | low … high | × the limit, or the plain way |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if "median" not in row:
            lines.append(f"| {row['place']} | {row['system']} | failed: {row['failed']} | | |")
            continue
        if row.get("task") in ("score", "prefill"):
            unit, values = "tokens/s", [1 / row[key] * row["batch"] for key in ("median", "high", "low")]
        else:
            unit, values = "ms", [row[key] * 1e3 for key in ("median", "low", "high")]
        middle, low, high = (f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in values)
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        lines.append(f"| {row['place']} | {row['system']} | {middle} {unit} | {low} … {high} | {ratio} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Time per token over the window, one line for each system, one panel for each kind of cell."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        if "median" in row and "task" in row:
            name = (
                f"{row['task']} {row['model']} {row['dtype']}, batch {row['batch']}, {row['threads']} threads"
            )
            panels.setdefault(name, {}).setdefault(row["system"], []).append(row)
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), squeeze=False)
    for ax, (name, systems) in zip(axes[0], panels.items()):  # noqa: B905
        for system, cells in systems.items():
            cells = sorted(cells, key=lambda row: row["window"])
            style = {"color": "black", "linestyle": "--"} if system == "limit" else {"marker": "o"}
            ax.plot([c["window"] for c in cells], [c["median"] * 1e3 for c in cells], label=system, **style)
        ax.set(title=name, xlabel="window, tokens", ylabel="ms per token", yscale="log")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def busy(seconds: float = 1.0) -> float:
    """How many cores others use while we do nothing: 0 where the system does not tell."""

    def ticks() -> Any:
        values = [int(value) for value in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(values), values[3] + values[4]

    try:
        all_before, idle_before = ticks()
        time.sleep(seconds)
        all_after, idle_after = ticks()
    except (OSError, ValueError):
        return 0.0
    share = 1 - (idle_after - idle_before) / max(1, all_after - all_before)
    return share * (os.cpu_count() or 1)


def describe() -> dict[str, Any]:
    import torch

    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return {
        "cpu": locals().get("name", platform.processor()),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "others": round(busy(), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="+", choices=["decode", "prefill", "score", "load", "memory"])
    parser.add_argument("--model", nargs="+", default=["S", "M"], choices=list(SIZES))
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--window", nargs="+", type=int, default=[1024])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count() or 1])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--systems", nargs="+", default=["limit", "ours", "compiled", "dynamic", "static"])
    parser.add_argument(
        "--streaming-llm", metavar="FOLDER", help="an environment with its package on the path"
    )
    parser.add_argument("--attention-sinks", metavar="FOLDER", help="an environment that has attention_sinks")
    parser.add_argument(
        "--llama-cpp", metavar="FOLDER", help="an environment that has llama-cpp-python and gguf"
    )
    parser.add_argument("--profile", action="store_true", help="count what waits, and per token; ours only")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, help="per round; default: 20 decoded (S: 200), 2 windows read")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    args = parser.parse_args()

    machine = describe()
    print(json.dumps(machine))
    if machine["others"] > 0.2:
        print(f"warning: others use {machine['others']} cores: compare, but do not quote", file=sys.stderr)
    peers = {name: getattr(args, name.replace("-", "_")) for name in PEERS}
    systems = [name for name in SYSTEMS if name in args.systems or peers.get(name)]
    rows: list[dict[str, Any]] = []
    cells = [
        Spec("", task, model, dtype, window, batch, threads, args.device, args.tokens or 0)
        for task in args.tasks if task not in ("load", "memory")
        for model in args.model for dtype in args.dtype for window in args.window
        for batch in args.batch for threads in (args.threads if args.device == "cpu" else args.threads[-1:])
    ]  # fmt: skip
    if args.profile:
        for cell in cells:
            for system in [name for name in args.systems if name in OURS]:
                counts = profiled(replace(cell, system=system, tokens=cell.tokens or 50))
                print(json.dumps({"what": cell.place, "system": system, **counts}))
        return
    for cell in cells:
        workers = []
        for system in systems:
            python = path = None
            if peers.get(system):
                path = os.path.expanduser(peers[system])
                python = os.path.join(path, "bin", "python")
            spec = replace(cell, system=system, tokens=cell.tokens or _amount(cell, system))
            if _possible(spec):
                workers.append(Worker(spec, python or sys.executable, path))
                if args.device != "cpu":  # two may not fit beside each other
                    _run([workers[-1]], args.rounds)
        if args.device == "cpu":
            _run(workers, args.rounds)
        rows += measured(workers)
        print(table(rows[-len(workers) :]), flush=True)
    if "load" in args.tasks:
        rows += load_times(args.model, args.dtype, args.rounds)
        print(table([row for row in rows if "task" not in row]))
    if "memory" in args.tasks:
        held = memory_rows([
            Spec(system, "memory", model, dtype, window, batch, threads, "cpu", max(DECODED))
            for model in args.model for dtype in args.dtype for window in args.window
            for batch in args.batch for threads in args.threads
            for system in systems if system in ("ours", "compiled", "inductor")
        ])  # fmt: skip
        for row in held:
            rows.append(row)
            print(memory_table([row]), flush=True)
    late = busy()
    if late > 0.2:
        print(f"warning: others use {late:.2f} cores now", file=sys.stderr)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    if args.plot:
        plot(rows, args.plot)


def _run(workers: Sequence[Worker], rounds: int) -> None:
    for _ in range(rounds):
        for worker in workers:
            worker.round()
    for worker in workers:
        worker.end()


def _amount(cell: Spec, system: str) -> int:
    if cell.task == "decode" or system in ("streaming-llm", "attention-sinks"):
        # Small models, longer: in the first milliseconds of a round a second core is only waking up.
        return max(20, min(200, cell.window // 5)) if cell.model in ("tiny", "S") else 20
    return 2 * (SINKS + cell.window)


def _possible(spec: Spec) -> bool:
    """Whether a system does this at all."""
    if spec.system in ("limit", "llama-cpp", "static-compiled"):
        return spec.task == "decode" and (spec.dtype != "int8" or spec.system != "static-compiled")
    if spec.system in ("dynamic", "static", "sliding", "streaming-llm", "attention-sinks"):
        if spec.dtype == "int8":
            return False
        return spec.task == "decode" or (spec.task == "score") == (
            spec.system in ("streaming-llm", "attention-sinks")
        )
    return spec.task == "decode" or spec.system == "ours"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Spec(**json.loads(sys.argv[2])))
    elif sys.argv[1:2] == ["--memory"]:
        print(json.dumps(remember(Spec(**json.loads(sys.argv[2])), *sys.argv[3:])))
    else:
        main()
