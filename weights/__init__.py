"""How the outside spells it: hub names, config.json, safetensors, tensor names."""

from streamllm.weights import llama
from streamllm.weights.errors import CheckpointError, CheckpointNotFound, UnsupportedConfig
from streamllm.weights.family import Family

__all__ = ["FAMILIES", "CheckpointError", "CheckpointNotFound", "Family", "UnsupportedConfig"]

# model_type of config.json -> how such checkpoints are spelled
FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
}
