"""streamllm: the model as `streamllm.load` returns it, or compiled."""

from __future__ import annotations

from typing import Any

from benchmark.spec import SINKS, SIZES, Round, Spec, random_tokens, synchronize

# Systems of this library -> backend of streamllm.compile; None: not compiled.
BACKEND_OF = {"ours": None, "compiled": "flat", "inductor": "inductor", "cudagraphs": "cudagraphs"}


def ours(spec: Spec) -> Round:
    import torch

    import streamllm

    model: Any = random_llama(spec)
    # On an accelerator the float32 scores of a chunk, [B, H, chunk, K], must fit into memory with a large batch.
    chunk = 512 if spec.device == "cpu" else max(32, 512 // spec.batch)
    cache = streamllm.SinkCache(model, SINKS, spec.window, spec.batch, chunk)
    model = compiled_for(spec, model)
    text = random_tokens(spec, SINKS + spec.window + spec.tokens)
    with torch.inference_mode():
        model(text, cache, logits_to_keep=1)

    def decode() -> None:
        with torch.inference_mode():
            token = text[:, :1]
            for _ in range(spec.tokens):
                token = model(token, cache, logits_to_keep=1)[:, -1].argmax(-1, keepdim=True)
        synchronize(spec)

    def score() -> None:
        with torch.inference_mode():
            for part in text[:, : spec.tokens].split(cache.chunk, 1):
                model(part, cache)
        synchronize(spec)

    def prefill() -> None:
        cache.reset()
        with torch.inference_mode():
            model(text[:, : spec.tokens], cache, logits_to_keep=1)
        synchronize(spec)

    return {"decode": decode, "score": score, "prefill": prefill}[spec.task]


def compiled_for(spec: Spec, model: Any) -> Any:
    """The model, compiled where the system asks for it."""
    import streamllm

    backend = BACKEND_OF[spec.system]
    return streamllm.compile(model, backend=backend) if backend else model


def random_llama(spec: Spec) -> Any:
    """The library's Llama with random weights, in the layouts that the loader chooses."""
    import torch

    from streamllm.models import linear, llama
    from streamllm.models.rotary import Rope

    size = SIZES[spec.model]
    head = size["width"] // size["heads"]
    config = llama.Config(
        **size, head_dim=head, rope=Rope(10000.0, head), trained_length=1 << 20, norm_eps=1e-5,
        activation="silu", attention_bias=False, mlp_bias=False, tied=False,
    )  # fmt: skip
    dtype = getattr(torch, spec.computes_in)
    with torch.device("meta"):
        model = llama.Model(config).to(dtype)
    model = model.to_empty(device=spec.device).eval().requires_grad_(False)
    generator = torch.Generator(spec.device).manual_seed(0)
    for weight in model.parameters():
        weight.data.normal_(1.0 if weight.dim() == 1 else 0.0, 0.02, generator=generator)
    if spec.quantize:
        linear.quantize(model, spec.quantize)
    linear.arrange(model)
    return model
