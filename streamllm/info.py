"""info and models: what a checkpoint is, and which there are, before any weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import click
import torch

from streamllm.cache import SinkCache
from streamllm.load import open_source
from streamllm.models.alibi import Alibi
from streamllm.models.rotary import Rope
from streamllm.models.step import Geometry
from streamllm.tokenizer import TOKENIZER_FILES
from streamllm.weights import FAMILIES
from streamllm.weights.checkpoint import DTYPES, INDEX, PICKLE, PICKLE_INDEX, SINGLE, Checkpoint
from streamllm.weights.files import read_json

# model_type -> what is there of it, and names on the hub. A family that is missing here works all the same.
KNOWN: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "llama": [
        ("Llama 1 to 3.2, all rope types", ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B")),
        ("tied head", ("meta-llama/Llama-3.2-1B", "HuggingFaceTB/SmolLM2-135M")),
        ("its kin", ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "codellama/CodeLlama-7b-hf",
                     "lmsys/vicuna-7b-v1.5", "openlm-research/open_llama_3b_v2", "tiiuae/Falcon3-7B-Base")),
    ],
    "mistral": [
        ("with a window of its own", ("mistralai/Mistral-7B-v0.1",)),
        ("without", ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-Nemo-Base-2407")),
    ],
    "qwen2": [("Qwen2 and Qwen2.5, biased q, k, v", ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B-Instruct"))],
    "qwen3": [("normed queries and keys", ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B"))],
    "gpt_neox": [
        ("parallel residual, a quarter rotary", ("EleutherAI/pythia-160m", "EleutherAI/pythia-6.9b",
                                                 "EleutherAI/gpt-neox-20b", "databricks/dolly-v2-3b")),
        ("sequential residual", ("togethercomputer/RedPajama-INCITE-Base-3B-v1",)),
        ("StableLM-alpha", ("stabilityai/stablelm-base-alpha-3b",)),
    ],
    "falcon": [
        ("one key head for all", ("tiiuae/falcon-7b",)),
        ("grouped keys, two norms", ("tiiuae/falcon-40b", "tiiuae/falcon-180B")),
        ("grouped keys, one norm", ("tiiuae/falcon-11B",)),
        ("ALiBi, sequential", ("tiiuae/falcon-rw-1b", "tiiuae/falcon-rw-7b")),
    ],
    "mpt": [
        ("ALiBi", ("mosaicml/mpt-7b", "mosaicml/mpt-7b-chat", "mosaicml/mpt-30b")),
        ("clipped, ALiBi to 16", ("mosaicml/mpt-7b-storywriter",)),
    ],
}  # fmt: skip

ELSEWHERE = ("eos_token_id",)  # keys of config.json that act outside of the model


@click.command()
def models() -> None:
    """The families of models, their variants, and names on the hub."""
    click.echo("\n".join(_families()))


def _families() -> Iterator[str]:
    yield f"{'model_type':<16} {'variant':<36} on the hub"
    spellings: dict[int, list[str]] = {}
    for name, family in FAMILIES.items():
        spellings.setdefault(id(family), []).append(name)
    for names in sorted(sorted(names, key=lambda name: name not in KNOWN) for names in spellings.values()):
        name, *others = names
        for variant, hub in KNOWN.get(name, [("", ())]):
            for repository in hub or ("",):
                yield f"{name:<16} {variant:<36} {repository}".rstrip()
                name = variant = ""
        for other in others:
            yield f"{other:<16} {'(the same, as old files spell it)'}"
    yield ""
    yield "Any checkpoint of these model_types loads, by name or from a folder; see `streamllm info`."


@click.command()
@click.argument("name", metavar="[NAME|FOLDER]", required=False)
@click.option("--revision", help="Branch, tag, commit or refs/pr/N of a hub repository.")
@click.option(
    "--sinks", type=click.IntRange(0), default=4, show_default=True, help="For the size of the cache."
)
@click.option("--window", type=click.IntRange(1), help="… [default: 1020, or what the model was trained for]")
@click.option("--dtype", default="auto", show_default=True, help="… float32, bfloat16, float16, float64.")
def info(name: str | None, revision: str | None, sinks: int, window: int | None, dtype: str) -> None:
    """What a checkpoint is: hub name or folder. Its weights are neither read nor fetched."""
    source = open_source(name, revision=revision)
    checkpoint = Checkpoint(source)
    click.echo("\n".join(f"{what:<12} {line}" for what, line in describe(checkpoint, sinks, window, dtype)))


def describe(
    checkpoint: Checkpoint, sinks: int = 4, window: int | None = None, dtype: torch.dtype | str = "auto"
) -> Iterator[tuple[str, str]]:
    """Lines about a checkpoint: what, and its value. Further lines about the same have an empty what.

    Raises ValueError for a dtype, sinks or a window that cannot be; CheckpointError for a broken index.
    """
    source, config = checkpoint.source, checkpoint.config
    files, dtypes = _files(checkpoint)
    chosen, why = _dtype(checkpoint, dtype, dtypes)
    model = checkpoint.build().to(chosen)
    geometry: Any = model.geometry
    assert isinstance(geometry, Geometry)
    count = sum(parameter.numel() for parameter in model.parameters())

    commit = getattr(source, "commit", None)
    yield "name", source.name if commit is None else f"{source.name} at {commit}"
    yield (
        "architecture",
        f"{checkpoint.config_reader.get('model_type')}: {config.layers} layers, width {config.width:,}, "
        f"MLP {config.mlp_width:,}, vocabulary {config.vocab_size:,}",
    )
    yield "", f"the head is {'the embedding (tied)' if config.tied else 'apart from the embedding'}"
    yield "parameters", f"{count:,}: {_bytes(count * chosen.itemsize)} in {_name(chosen)} ({why})"
    yield (
        "heads",
        f"{config.heads} for queries, {geometry.kv_heads} for keys and values, of {geometry.head_dim} dimensions",
    )
    yield from _positions(config, geometry.head_dim)
    trained = geometry.trained_length
    yield "trained for", "any length: its encoding sets no end" if trained is None else f"{trained:,} tokens"
    own = [window for window in geometry.windows if window is not None]
    if own:
        sizes = ", ".join(f"{size:,}" for size in sorted(set(own)))
        yield "own window", f"{sizes} tokens, in {len(own)} of {len(geometry.windows)} layers"
    yield from (("files" if i == 0 else "", line) for i, line in enumerate(files))

    token = sum(2 * geometry.kv_heads * geometry.head_dim * chosen.itemsize for _ in geometry.windows)
    cache = SinkCache(model, sinks=sinks, window=window)
    yield "cache", f"{token:,} bytes per token in {_name(chosen)}"
    yield (
        "",
        f"{sinks} sinks and {cache.window:,} recent tokens: {_bytes(cache.nbytes)}, however long the stream",
    )
    for key in ELSEWHERE:
        checkpoint.config_reader.get(key)
    yield "no effect", ", ".join(checkpoint.config_reader.unread()) or "every key of config.json has one"


def _positions(config: Any, head_dim: int) -> Iterator[tuple[str, str]]:
    """How places are encoded, with the numbers that act."""
    for number in dataclasses.fields(config):
        value = getattr(config, number.name)
        if isinstance(value, Rope):
            kind = type(value).__name__.removesuffix("Rope").lower()
            turning = "all" if value.dim == head_dim else f"{value.dim} of {head_dim}"
            yield (
                "positions",
                f"rotary{f', {kind}' if kind else ''}: theta {value.theta:,g}, {turning} dimensions turn",
            )
            shared = {field.name for field in dataclasses.fields(Rope)}
            rest = [field.name for field in dataclasses.fields(value) if field.name not in shared]
            rest += ["attention_factor"] if value.attention_factor != 1 else []
            if rest:
                yield "", ", ".join(f"{name} {_number(getattr(value, name))}" for name in rest)
        elif isinstance(value, Alibi):
            slopes = value.slopes()
            yield "positions", f"ALiBi: slopes from {slopes.max():g} to {slopes.min():g}"


def _number(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} numbers in {min(value):g} … {max(value):g}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _files(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """A line for each file, with its size; and the types of the tensors, where their headers are at hand."""
    source = checkpoint.source
    names: list[str] = []
    for single, index in ((SINGLE, INDEX), (PICKLE, PICKLE_INDEX)):
        if source.has(index):
            weight_map = read_json(source.file(index)).get("weight_map")
            if isinstance(weight_map, dict):
                names = sorted({shard for shard in weight_map.values() if isinstance(shard, str)})
        elif source.has(single):
            names = [single]
        if names:
            break
    if not names:
        return ["no weights here"], []
    sizes = {name: source.size(name) for name in names}
    missing = [name for name, size in sizes.items() if size is None]
    whole = sum(size or 0 for size in sizes.values())
    lines = [f"{name}  {_bytes(size)}" for name, size in sizes.items() if size is not None]
    if len(lines) > 6:
        lines = [*lines[:2], f"… {len(lines) - 4} more", *lines[-2:]]
    if len(names) > 1:
        lines.append(f"{len(names)} files, {_bytes(whole)}")
    lines += [f"{name}  MISSING" for name in missing]
    tokenizers = [name for name in TOKENIZER_FILES[:2] if source.has(name)]
    lines.append(tokenizers[0] if tokenizers else "no tokenizer")
    dtypes: list[str] = []
    if getattr(source, "commit", None) is None and not missing and names[0].endswith(".safetensors"):
        dtypes = sorted({stored.dtype for stored in checkpoint.tensors.values()})
        lines[-1:-1] = [f"{len(checkpoint.tensors)} tensors of {', '.join(dtypes)}"]
    return lines, dtypes


def _dtype(checkpoint: Checkpoint, wanted: torch.dtype | str, stored: list[str]) -> tuple[torch.dtype, str]:
    """The type to count in, and why. A checkpoint that says nothing and is not here is taken for float32."""
    named = any(checkpoint.config_reader.get(key) is not None for key in ("dtype", "torch_dtype"))
    if wanted == "auto" and not named and not stored:
        return torch.float32, "the config does not say"
    if wanted == "auto":
        return checkpoint.dtype(), "as the config says" if named else "as stored"
    return checkpoint.dtype(wanted), "as asked for"


def _name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"
