"""Measures the peak resident memory of loading a checkpoint on the CPU, with this library and transformers.

    python tools/load_memory.py --gigabytes 2
    python tools/load_memory.py --gigabytes 2 --loader streamllm --processes 4    # tensor-parallel: of one process

Writes a random Llama in bfloat16 of that size, in shards. Then new processes load it, unchanged and cast to
other types. The peak is the kernel's count of resident pages (VmHWM) minus those before loading, with all
libraries imported. It is compared with the larger of the file and the result, the least that a loader needs.
Mapped pages of the file count as resident, although the kernel may drop them at any time. Anonymous memory,
which is also printed, cannot be dropped.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from tqdm import tqdm

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHARD_BYTES = 500_000_000  # a shard is full when it has more

PROGRAM = """
import gc, json, os, re, sys, threading, time, warnings
from pathlib import Path
import torch
folder, loader, dtype = sys.argv[1:]
torch.set_num_threads(1)
def status(field):
    return int(re.search(field + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
if loader == "streamllm":
    import streamllm
    parallel = "WORLD_SIZE" in os.environ
    load = lambda: streamllm.load_model(folder, dtype=dtype, device="cpu", tensor_parallel=parallel)
else:
    import transformers
    from transformers import AutoModelForCausalLM, LlamaForCausalLM
    transformers.logging.disable_progress_bar()
    load = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
gc.collect()
before, anonymous, peaks, done = status("VmRSS"), status("RssAnon"), [0], threading.Event()
def watch():
    while not done.wait(0.005):
        peaks[0] = max(peaks[0], status("RssAnon"))
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
begun = time.perf_counter()
model = load()
took = time.perf_counter() - begun
touched = sum(float(torch.aminmax(p.detach()).max) for p in model.parameters() if p.layout == torch.strided)
done.set(), watcher.join()
result = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
print(json.dumps([status("VmHWM") - before, max(peaks[0] - anonymous, 0), result, took, touched == touched]))
"""


Shapes = dict[str, tuple[int, ...]]


def llama_shapes(config: dict[str, Any]) -> Shapes:
    """The tensors of a Llama checkpoint with an untied head."""
    width, mlp, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", width // heads)
    layer_shapes = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (heads * head_dim, width),
        "self_attn.k_proj": (kv_heads * head_dim, width),
        "self_attn.v_proj": (kv_heads * head_dim, width),
        "self_attn.o_proj": (width, heads * head_dim),
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
    }
    shapes: Shapes = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocabulary, width),
    }
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in layer_shapes.items()}
    return shapes


def _bytes(shapes: Shapes) -> int:
    """Bytes in bfloat16."""
    return 2 * sum(math.prod(shape) for shape in shapes.values())


def make(folder: Path, size: int) -> int:
    """Writes a random checkpoint of about `size` bytes; returns the bytes of its files."""
    no_layers, one_layer = (_bytes(llama_shapes(CONFIG | {"num_hidden_layers": n})) for n in (0, 1))
    layers = max(1, (size - no_layers) // (one_layer - no_layers))
    config = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = llama_shapes(config)
    shards: list[Shapes] = [{}]
    for name, shape in shapes.items():
        if _bytes(shards[-1]) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for number, shard in enumerate(tqdm(shards, desc="writing the checkpoint", disable=None), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02) for name, shape in shard.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": _bytes(shapes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure(folder: Path, loader: str, dtype: str, processes: int = 1) -> tuple[int, int, int, float]:
    """Bytes at the peak, anonymous bytes at their peak, bytes of the result, and seconds.

    Of several processes that load the model together, each number is the largest of any process.
    """
    command = [sys.executable, "-c", PROGRAM, str(folder), loader, dtype]
    if processes > 1:
        run = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
        command = [*run, "--no-python", *command]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{loader} failed to load as {dtype}:\n{done.stderr}")
    found = [json.loads(line) for line in re.findall(r"\[\d.*?\]", done.stdout)]
    assert len(found) == processes
    assert all(finite for *_, finite in found)
    peak, anonymous, result, took = (max(numbers) for numbers in list(zip(*found, strict=True))[:4])
    return peak, anonymous, result, took


@click.command()
@click.option("--gigabytes", default=2.0, show_default=True, help="Size of the checkpoint.")
@click.option(
    "--dtype", "dtypes", multiple=True, default=["bfloat16", "float16", "float32"], show_default=True
)
@click.option("--loader", "loaders", multiple=True, default=["streamllm", "transformers"], show_default=True)
@click.option("--processes", type=click.IntRange(1), default=1, help="Load it in so many processes together.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Where to write it.  [default: the system's folder for temporary files]",
)
def main(
    gigabytes: float, dtypes: tuple[str, ...], loaders: tuple[str, ...], processes: int, folder: Path | None
) -> None:
    """Measure the peak memory of loading a random Llama on the CPU."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=folder) as space:
        size = make(Path(space), int(gigabytes * 1e9))
        click.echo(
            f"a random Llama in bfloat16, {size / 1e9:.2f} GB in files of about {SHARD_BYTES / 1e9:.1f} GB"
        )
        click.echo(f"{'loader':14}{'as':>10}{'result GB':>11}{'peak GB':>9}{'anonymous':>11}{'seconds':>9}"
                   f"{'peak / larger of file and result':>35}")  # fmt: skip
        for loader in loaders:
            for dtype in dtypes:
                peak, anonymous, result, took = measure(Path(space), loader, dtype, processes)
                ratio = peak / max(size / processes, result)
                numbers = (
                    f"{result / 1e9:11.2f}{peak / 1e9:9.2f}{anonymous / 1e9:11.2f}{took:9.1f}{ratio:35.3f}"
                )
                click.echo(f"{loader:14}{dtype:>10}{numbers}")


if __name__ == "__main__":
    main()
