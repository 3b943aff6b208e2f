"""How the outside spells it: hub names, config.json, safetensors, tensor names."""

from streamllm.weights import falcon, gpt_neox, llama, mpt
from streamllm.weights.errors import CheckpointError, CheckpointNotFound, UnsupportedConfig
from streamllm.weights.family import Family

__all__ = ["FAMILIES", "CheckpointError", "CheckpointNotFound", "Family", "UnsupportedConfig", "supported"]

# model_type of config.json -> how such checkpoints are spelled
FAMILIES: dict[str, Family] = {
    "RefinedWeb": falcon.FAMILY,  # Falcon before it was so called
    "RefinedWebModel": falcon.FAMILY,
    "falcon": falcon.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "llama": llama.FAMILY,
    "mpt": mpt.FAMILY,
}


def supported() -> str:
    """What an error about an unknown model_type offers instead."""
    return f"supported: {', '.join(sorted(FAMILIES))}"
