"""What is computed: one file per architecture, read top to bottom, and the parts they share."""

from streamllm.models import falcon, gpt_neox, llama, mpt
from streamllm.models.step import Geometry, Plan, Step

__all__ = ["ARCHITECTURES", "Geometry", "Plan", "Step"]

# model_type of config.json -> (Config, Model)
ARCHITECTURES = {
    "falcon": (falcon.Config, falcon.Model),
    "gpt_neox": (gpt_neox.Config, gpt_neox.Model),
    "llama": (llama.Config, llama.Model),
    "mistral": (llama.Config, llama.Model),
    "mpt": (mpt.Config, mpt.Model),
    "qwen2": (llama.Config, llama.Model),
    "qwen3": (llama.Config, llama.Model),
}
