"""The model_types of config.json that load: which module reads them, what variants they have, and examples on the hub.

The table is plain data, so that it can be printed without importing torch. `FAMILIES` imports the module of a
row when that row is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamllm.weights.family import Family


@dataclass(frozen=True)
class Variant:
    """What some checkpoints of a model_type have in common."""

    description: str
    examples: tuple[str, ...]  # names on the hub


@dataclass(frozen=True)
class ModelType:
    """One value of model_type in config.json."""

    module: str  # in streamllm.weights; its `family_name` says how such checkpoints are read
    family_name: str = "FAMILY"
    variants: tuple[Variant, ...] = ()
    replaced_by: str | None = None  # the model_type that newer files of the same model have


MODEL_TYPES: dict[str, ModelType] = {
    "llama": ModelType(
        "llama",
        variants=(
            Variant(
                "Llama 1 to 3.2, all rope types",
                ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B"),
            ),
            Variant("tied head", ("meta-llama/Llama-3.2-1B", "HuggingFaceTB/SmolLM2-135M")),
            Variant(
                "other models of the same layout",
                (
                    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
                    "codellama/CodeLlama-7b-hf",
                    "lmsys/vicuna-7b-v1.5",
                    "openlm-research/open_llama_3b_v2",
                    "tiiuae/Falcon3-7B-Base",
                ),
            ),
        ),
    ),
    "mistral": ModelType(
        "mistral",
        variants=(
            Variant("sliding window", ("mistralai/Mistral-7B-v0.1",)),
            Variant(
                "no sliding window",
                ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-Nemo-Base-2407"),
            ),
        ),
    ),
    "qwen2": ModelType(
        "qwen",
        "QWEN2",
        (Variant("Qwen2 and Qwen2.5, bias on q, k, v", ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B-Instruct")),),
    ),
    "qwen3": ModelType(
        "qwen", "QWEN3", (Variant("RMSNorm on queries and keys", ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B")),)
    ),
    "gpt_neox": ModelType(
        "gpt_neox",
        variants=(
            Variant(
                "parallel residual, 25 % rotary",
                (
                    "EleutherAI/pythia-160m",
                    "EleutherAI/pythia-6.9b",
                    "EleutherAI/gpt-neox-20b",
                    "databricks/dolly-v2-3b",
                ),
            ),
            Variant("sequential residual", ("togethercomputer/RedPajama-INCITE-Base-3B-v1",)),
            Variant("StableLM-alpha", ("stabilityai/stablelm-base-alpha-3b",)),
        ),
    ),
    "falcon": ModelType(
        "falcon",
        variants=(
            Variant("multi-query attention", ("tiiuae/falcon-7b",)),
            Variant("grouped-query attention, two norms", ("tiiuae/falcon-40b", "tiiuae/falcon-180B")),
            Variant("grouped-query attention, one norm", ("tiiuae/falcon-11B",)),
            Variant("ALiBi, sequential residual", ("tiiuae/falcon-rw-1b", "tiiuae/falcon-rw-7b")),
        ),
    ),
    "RefinedWeb": ModelType("falcon", replaced_by="falcon"),
    "RefinedWebModel": ModelType("falcon", replaced_by="falcon"),
    "mpt": ModelType(
        "mpt",
        variants=(
            Variant("ALiBi", ("mosaicml/mpt-7b", "mosaicml/mpt-7b-chat", "mosaicml/mpt-30b")),
            Variant("clipped q, k, v; ALiBi up to 16", ("mosaicml/mpt-7b-storywriter",)),
        ),
    ),
}


class _Families(Mapping[str, "Family"]):
    """model_type -> Family, imported when it is asked for."""

    def __getitem__(self, model_type: str) -> Family:
        row = MODEL_TYPES[model_type]
        module = importlib.import_module(f"streamllm.weights.{row.module}")
        family: Family = getattr(module, row.family_name)
        return family

    def __iter__(self) -> Iterator[str]:
        return iter(MODEL_TYPES)

    def __len__(self) -> int:
        return len(MODEL_TYPES)

    def __contains__(self, model_type: object) -> bool:
        return model_type in MODEL_TYPES


FAMILIES: Mapping[str, Family] = _Families()
