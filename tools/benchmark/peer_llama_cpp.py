"""llama.cpp through llama-cpp-python, in an environment of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmark.spec import SINKS, SIZES, Round, Spec


def llama_cpp(spec: Spec) -> Round:
    """Decodes the last `tokens` of S + W places, again in every round, so that nothing is evicted."""
    import llama_cpp

    size = SIZES[spec.model]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.gguf")
        _write_gguf(path, spec)
        llama = llama_cpp.Llama(
            path, n_ctx=SINKS + spec.window + spec.tokens + 8, n_threads=spec.threads, n_batch=512,
            n_threads_batch=spec.threads, n_gpu_layers=0, use_mmap=False, verbose=False,
            type_k=0 if spec.dtype == "float32" else 1, type_v=0 if spec.dtype == "float32" else 1,
        )  # fmt: skip
    full = SINKS + spec.window
    llama.eval([i % size["vocab_size"] for i in range(full - spec.tokens)])
    start = llama.n_tokens

    def decode() -> None:
        for i in range(spec.tokens):
            llama.eval([i])
        llama.n_tokens = start  # the next eval drops the cached tokens from here on

    return decode


def _write_gguf(path: str, spec: Spec) -> None:
    """Writes a random Llama as a GGUF file."""
    import gguf
    import numpy as np

    size = SIZES[spec.model]
    C, head = size["width"], size["width"] // size["heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1 << 16)
    writer.add_embedding_length(C)
    writer.add_block_count(size["layers"])
    writer.add_feed_forward_length(size["mlp_width"])
    writer.add_head_count(size["heads"])
    writer.add_head_count_kv(size["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(size["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    random = np.random.default_rng(0)
    kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "Q8_0", "int4": "Q4_0"}[
        spec.dtype
    ]
    kind = getattr(gguf.GGMLQuantizationType, kind)

    def add(name: str, *shape: int) -> None:
        values = random.standard_normal(shape, dtype=np.float32) * 0.02
        if len(shape) == 1:
            writer.add_tensor(name, values + 1)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", size["vocab_size"], C)
    add("output_norm.weight", C)
    add("output.weight", size["vocab_size"], C)
    for n in range(size["layers"]):
        add(f"blk.{n}.attn_norm.weight", C)
        add(f"blk.{n}.ffn_norm.weight", C)
        add(f"blk.{n}.attn_q.weight", C, C)
        add(f"blk.{n}.attn_k.weight", size["kv_heads"] * head, C)
        add(f"blk.{n}.attn_v.weight", size["kv_heads"] * head, C)
        add(f"blk.{n}.attn_output.weight", C, C)
        add(f"blk.{n}.ffn_gate.weight", size["mlp_width"], C)
        add(f"blk.{n}.ffn_up.weight", size["mlp_width"], C)
        add(f"blk.{n}.ffn_down.weight", C, size["mlp_width"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
