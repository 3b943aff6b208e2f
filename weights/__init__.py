"""How the outside spells it: hub names, config.json, safetensors, tensor names."""

from streamllm.weights import gpt_neox, llama
from streamllm.weights.errors import CheckpointError, CheckpointNotFound, UnsupportedConfig
from streamllm.weights.family import Family

__all__ = ["FAMILIES", "CheckpointError", "CheckpointNotFound", "Family", "UnsupportedConfig", "supported"]

# model_type of config.json -> how such checkpoints are spelled
FAMILIES: dict[str, Family] = {
    "gpt_neox": gpt_neox.FAMILY,
    "llama": llama.FAMILY,
}


def supported() -> str:
    """What an error about an unknown model_type offers instead."""
    return f"supported: {', '.join(sorted(FAMILIES))}"
