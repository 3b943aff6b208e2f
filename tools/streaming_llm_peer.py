"""Runs mit-han-lab/streaming-llm for tools/against_streaming_llm.py, in an environment with transformers 4.33.

    python streaming_llm_peer.py SOURCE FAMILY LENGTH FOLDER START RECENT

Writes a small checkpoint, its tokens and the logits of the original into FOLDER. Prints as JSON whether the original
evicts on this model, and the version of transformers.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

import torch
import transformers

SIZES = {"vocab_size": 200}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "Llama",
        dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2),
    ),
    "gpt_neox": (
        "GPTNeoX",
        dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, rotary_pct=0.5),
    ),
    "falcon": (
        "Falcon",
        dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, multi_query=True, parallel_attn=True,
             new_decoder_architecture=False, alibi=False, bias=False),
    ),
    "mpt": ("Mpt", dict(d_model=64, n_heads=4, n_layers=3, max_seq_len=128)),
}  # fmt: skip


def make_model(family: str) -> Any:
    """A model with random weights that are large enough for every error to show."""
    name, sizes = CONFIGS[family]
    config = getattr(transformers, f"{name}Config")(**SIZES, **sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15).add_(1.0 if parameter.dim() == 1 else 0.0)
    return model


def run(model: Any, tokens: torch.Tensor, evict: Any) -> tuple[torch.Tensor, int]:
    """The logits of one token per forward, as in its eval_long_ppl.py, and how many keys are cached at the end."""
    past, logits = None, []
    with torch.no_grad():
        for token in tokens.split(1, dim=1):
            outputs = model(token, past_key_values=past, use_cache=True)
            logits.append(outputs.logits)
            past = evict(outputs.past_key_values)
    return torch.cat(logits, 1), int(past[0][0].shape[2])


def main() -> None:
    source, family, length, folder, start, recent = sys.argv[1:]
    sys.path.insert(0, source)
    from streaming_llm.enable_streaming_llm import enable_streaming_llm
    from streaming_llm.kv_cache import StartRecentKVCache

    tokens = torch.randint(0, 200, (1, int(length)), generator=torch.Generator().manual_seed(1))
    model = make_model(family)
    os.makedirs(folder, exist_ok=True)
    model.save_pretrained(folder, safe_serialization=True)
    with contextlib.redirect_stdout(sys.stderr):
        evict = enable_streaming_llm(model, int(start), int(recent))
        try:
            _, cached = run(model, tokens, evict)
            shipped = (
                "evicts" if cached == int(start) + int(recent) else f"never evicts: {cached} keys are cached"
            )
        except (AttributeError, RuntimeError, ValueError) as error:
            shipped = f"{type(error).__name__}: {error}".splitlines()[0]
        # The caches of 4.33's own Falcon and MPT are [batch, heads, length, width].
        evict = StartRecentKVCache(int(start), int(recent), k_seq_dim=2, v_seq_dim=2)
        if family == "falcon":
            for block in model.transformer.h:
                block.self_attention.num_kv = 1
        logits, cached = run(model, tokens, evict)
    assert cached == int(start) + int(recent)
    torch.save(tokens, os.path.join(folder, "tokens.pt"))
    torch.save(logits, os.path.join(folder, "logits.pt"))
    print(json.dumps({"as shipped": shipped, "transformers": transformers.__version__}))


if __name__ == "__main__":
    main()
