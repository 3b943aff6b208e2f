"""Peak resident memory of loading a checkpoint on the CPU, beside transformers' own.

    python tools/load_memory.py --gigabytes 2

Writes a random Llama in bfloat16 of that size, in shards, and loads it in fresh processes: by this library as
it is and cast, and by transformers. The peak is the kernel's count of resident pages (VmHWM) less what the
process had before it loaded, with its libraries imported; it is compared with the larger of the file and the
result, which is the least that any loader needs. Mapped pages of the file count as resident here, though the
kernel may drop them at any time; the anonymous part beside it cannot be dropped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from tqdm import tqdm

CONFIG = {
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
SHARD = 500_000_000  # bytes

MEASURE = """
import gc, json, re, sys, threading, time, warnings
from pathlib import Path
import torch
folder, loader, dtype = sys.argv[1:]
torch.set_num_threads(1)
def status(field):
    return int(re.search(field + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
if loader == "streamllm":
    import streamllm
    load = lambda: streamllm.load_model(folder, dtype=dtype, device="cpu")
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


def make(folder: Path, size: int) -> int:
    """A random checkpoint of about `size` bytes; returns the bytes of its weights."""
    c = CONFIG
    width, mlp, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    assert isinstance(width, int)
    assert isinstance(mlp, int)
    assert isinstance(vocab, int)
    kv = width // 8
    inner = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
    }
    per_layer = 2 * sum(torch.Size(shape).numel() for shape in inner.values())
    layers = max(1, (size - 4 * vocab * width) // per_layer)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocab, width),
    }
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in inner.items()}
    (folder / "config.json").write_text(json.dumps(c | {"num_hidden_layers": layers}))

    parts: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if 2 * sum(torch.Size(inside).numel() for inside in parts[-1].values()) > SHARD:
            parts.append({})
        parts[-1][name] = shape
    places = {}
    for number, part in enumerate(tqdm(parts, desc="writing the checkpoint", disable=None), 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {
            name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02) for name, shape in part.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {
        "metadata": {"total_size": 2 * sum(torch.Size(s).numel() for s in shapes.values())},
        "weight_map": places,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure(folder: Path, loader: str, dtype: str) -> tuple[int, int, int, float]:
    """Bytes at the peak, of them anonymous, bytes of the result, and seconds."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), loader, dtype], capture_output=True, text=True
    )
    if done.returncode:
        raise click.ClickException(f"{loader} failed to load as {dtype}:\n{done.stderr}")
    peak, anonymous, result, took, finite = json.loads(done.stdout.splitlines()[-1])
    assert finite
    return peak, anonymous, result, took


@click.command()
@click.option("--gigabytes", default=2.0, show_default=True, help="Size of the checkpoint.")
@click.option(
    "--dtype", "dtypes", multiple=True, default=["bfloat16", "float16", "float32"], show_default=True
)
@click.option("--loader", "loaders", multiple=True, default=["streamllm", "transformers"], show_default=True)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where to write it.  [default: a temporary folder]"
)
def main(gigabytes: float, dtypes: tuple[str, ...], loaders: tuple[str, ...], folder: Path | None) -> None:
    """Measure the peak memory of loading a random Llama on the CPU."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=folder) as space:
        size = make(Path(space), int(gigabytes * 1e9))
        click.echo(f"a random Llama in bfloat16, {size / 1e9:.2f} GB in files of up to {SHARD / 1e9:.1f} GB")
        click.echo(f"{'loader':14}{'as':>10}{'result GB':>11}{'peak GB':>9}{'anonymous':>11}{'seconds':>9}"
                   f"{'peak / larger of file and result':>35}")  # fmt: skip
        for loader in loaders:
            for dtype in dtypes:
                peak, anonymous, result, took = measure(Path(space), loader, dtype)
                ratio = peak / max(size, result)
                numbers = (
                    f"{result / 1e9:11.2f}{peak / 1e9:9.2f}{anonymous / 1e9:11.2f}{took:9.1f}{ratio:35.3f}"
                )
                click.echo(f"{loader:14}{dtype:>10}{numbers}")


if __name__ == "__main__":
    main()
