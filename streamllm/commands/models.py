"""`streamllm models`."""

from __future__ import annotations

from collections.abc import Iterator

import click

# model_type -> its variants, and names on the hub for each. A family without a row here loads all the same.
HUB_EXAMPLES: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "llama": [
        ("Llama 1 to 3.2, all rope types", ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B")),
        ("tied head", ("meta-llama/Llama-3.2-1B", "HuggingFaceTB/SmolLM2-135M")),
        ("other Llama models", ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "codellama/CodeLlama-7b-hf",
                                "lmsys/vicuna-7b-v1.5", "openlm-research/open_llama_3b_v2",
                                "tiiuae/Falcon3-7B-Base")),
    ],
    "mistral": [
        ("with a sliding window", ("mistralai/Mistral-7B-v0.1",)),
        ("without one", ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-Nemo-Base-2407")),
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
        ("one key head for all queries", ("tiiuae/falcon-7b",)),
        ("grouped keys, two norms", ("tiiuae/falcon-40b", "tiiuae/falcon-180B")),
        ("grouped keys, one norm", ("tiiuae/falcon-11B",)),
        ("ALiBi, sequential residual", ("tiiuae/falcon-rw-1b", "tiiuae/falcon-rw-7b")),
    ],
    "mpt": [
        ("ALiBi", ("mosaicml/mpt-7b", "mosaicml/mpt-7b-chat", "mosaicml/mpt-30b")),
        ("clipped, alibi_bias_max 16", ("mosaicml/mpt-7b-storywriter",)),
    ],
}  # fmt: skip


@click.command()
def models() -> None:
    """List the model families, and examples on the hub."""
    click.echo("\n".join(_lines()))


def _lines() -> Iterator[str]:
    yield f"{'model_type':<16} {'variant':<36} on the hub"
    for name, *aliases in _model_types():
        label = name
        for variant, repositories in HUB_EXAMPLES.get(name, [("", ())]):
            for repository in repositories or ("",):
                yield f"{label:<16} {variant:<36} {repository}".rstrip()
                label = variant = ""
        for alias in aliases:
            yield f"{alias:<16} {'(the same family in old files)'}"
    yield ""
    yield "Any checkpoint of these model_types loads, by name or from a folder; see `streamllm info`."


def _model_types() -> list[list[str]]:
    """The supported model_types, one list for each family: the name that HUB_EXAMPLES has comes first."""
    from streamllm.weights import FAMILIES

    names: dict[int, list[str]] = {}
    for name, family in FAMILIES.items():
        names.setdefault(id(family), []).append(name)
    return sorted(sorted(family, key=lambda name: name not in HUB_EXAMPLES) for family in names.values())
