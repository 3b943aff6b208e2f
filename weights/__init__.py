"""How the outside spells it: hub names, config.json, safetensors, tensor names."""
