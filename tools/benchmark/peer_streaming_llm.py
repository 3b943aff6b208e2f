"""mit-han-lab/streaming-llm and attention_sinks, each in an environment of its own."""

from __future__ import annotations

import tempfile
from typing import Any

from benchmark.peer_transformers import random_transformers_model
from benchmark.spec import SINKS, Round, Spec, random_tokens, synchronize


def streaming_llm(spec: Spec, package: str) -> Round:
    """A loop of single tokens past eviction, with `package`: "streaming-llm" or "attention-sinks".

    The same loop serves the task "score", because these packages have no exact way to evict within a chunk.
    """
    import torch
    from transformers import LlamaForCausalLM

    text = random_tokens(spec, SINKS + spec.window + 8)
    state: dict[str, Any] = {"past": None}
    if package == "attention-sinks":
        from attention_sinks import LlamaForCausalLM as AttentionSinksLlama

        with tempfile.TemporaryDirectory() as folder:  # attention_sinks patches only models that it loads
            random_transformers_model(spec, LlamaForCausalLM).save_pretrained(folder)
            model = AttentionSinksLlama.from_pretrained(
                folder, attention_sink_size=SINKS, attention_sink_window_size=spec.window - 1,
                torch_dtype=getattr(torch, spec.dtype),
            ).eval()  # fmt: skip
        evict = None
    else:
        from streaming_llm.enable_streaming_llm import enable_streaming_llm

        model = random_transformers_model(spec, LlamaForCausalLM)
        evict = enable_streaming_llm(model, start_size=SINKS, recent_size=spec.window - 1)

    def step(token: Any) -> Any:
        out = model(token, past_key_values=state["past"], use_cache=True)
        state["past"] = out.past_key_values if evict is None else evict(out.past_key_values)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def decode() -> None:
        token = text[:, :1]
        with torch.inference_mode():
            for _ in range(spec.tokens):
                token = step(token)
        synchronize(spec)

    with torch.inference_mode():
        step(text[:, : SINKS + spec.window - 1])
        for _ in range(3):
            step(text[:, :1])
    return decode
