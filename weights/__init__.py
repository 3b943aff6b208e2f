"""How the outside spells it: hub names, config.json, safetensors, tensor names."""

from streamllm.weights import falcon, gpt_neox, llama, mistral, mpt, qwen
from streamllm.weights.errors import CheckpointError, CheckpointNotFound, UnsupportedConfig
from streamllm.weights.family import Family

__all__ = ["FAMILIES", "CheckpointError", "CheckpointNotFound", "Family", "UnsupportedConfig"]

# model_type of config.json -> how such checkpoints are spelled
FAMILIES: dict[str, Family] = {
    "RefinedWeb": falcon.FAMILY,  # Falcon before it was so called
    "RefinedWebModel": falcon.FAMILY,
    "falcon": falcon.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "mpt": mpt.FAMILY,
    "qwen2": qwen.QWEN2,
    "qwen3": qwen.QWEN3,
}
