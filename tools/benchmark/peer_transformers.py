"""transformers' Llama with one of its own caches."""

from __future__ import annotations

import contextlib
from typing import Any

from benchmark.spec import SINKS, SIZES, Round, Spec, random_tokens, synchronize


def transformers(spec: Spec, kind: str) -> Round:
    """transformers with the cache `kind`: "dynamic", "static", "static-compiled" or "sliding".

    Only "sliding" evicts. "static-compiled" does what transformers' generate does with a static cache on CUDA: it
    prefills without compilation, then decodes through torch.compile with CUDA graphs.
    """
    import torch
    from transformers import DynamicCache, LlamaForCausalLM, MistralForCausalLM, StaticCache

    model = random_transformers_model(spec, MistralForCausalLM if kind == "sliding" else LlamaForCausalLM)
    full = SINKS + spec.window
    text = random_tokens(spec, full + spec.tokens)
    places = [torch.tensor([[full - spec.tokens + i]], device=spec.device) for i in range(spec.tokens)]
    decoding_model: Any = model
    if kind == "static-compiled":
        decoding_model = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def empty_cache() -> Any:
        if kind.startswith("static"):
            return StaticCache(config=model.config, max_cache_len=max(full, spec.tokens))
        return DynamicCache(config=model.config) if kind == "sliding" else DynamicCache()

    def filled_cache() -> Any:
        cache = empty_cache()
        with torch.inference_mode():
            model(text[:, : full - spec.tokens], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def decode() -> None:
        # The last `tokens` of S + W places, again in every round: the cache is never longer than ours.
        token = text[:, :1]
        with torch.inference_mode():
            for i in range(spec.tokens):
                torch.compiler.cudagraph_mark_step_begin()
                out = decoding_model(token, past_key_values=cache, use_cache=True, position_ids=places[i])
                token = out.logits[:, -1].argmax(-1, keepdim=True)
            if kind == "dynamic":
                cache.crop(-spec.tokens)
            elif kind.startswith("static"):
                for layer in cache.layers:
                    layer.cumulative_length -= spec.tokens
        synchronize(spec)

    def prefill() -> None:
        with torch.inference_mode():
            model(text[:, : spec.tokens], past_key_values=empty_cache(), use_cache=True, logits_to_keep=1)
        synchronize(spec)

    cache: Any = filled_cache() if spec.task == "decode" else None
    return {"decode": decode, "prefill": prefill}[spec.task]


def random_transformers_model(spec: Spec, model_class: Any) -> Any:
    import torch

    size = SIZES[spec.model]
    config = model_class.config_class(
        vocab_size=size["vocab_size"], hidden_size=size["width"], intermediate_size=size["mlp_width"],
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"], max_position_embeddings=1 << 16,
    )  # fmt: skip
    if hasattr(config, "sliding_window"):
        config.sliding_window = SINKS + spec.window
    torch.set_default_dtype(getattr(torch, spec.dtype))
    # A CPU takes minutes to draw 7 billion random numbers, so the device draws them.
    with contextlib.nullcontext() if spec.device == "cpu" else torch.device(spec.device):
        model = model_class(config).eval().requires_grad_(False).to(spec.device)
    torch.set_default_dtype(torch.float32)
    return model
