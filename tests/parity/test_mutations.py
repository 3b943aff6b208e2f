"""Would the parity tests notice a fault? Each mutation here reads a checkpoint wrongly on purpose.

A mutation is noticed where the logits differ by more than MARGIN times the tolerance, or where the checkpoint
no longer loads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from streamllm.models import falcon, llama, mpt, rotary
from streamllm.models.alibi import Alibi
from streamllm.weights import CheckpointError
from tests.parity.cases import TOLERANCE, Case
from tests.parity.mutations import (
    ABSENT,
    TURN,
    Mutation,
    activation,
    activation_of_relu_is_silu,
    adjacent_pairs,
    another_file,
    between_first,
    blocks,
    config,
    evenly,
    frequencies,
    groups_interleaved,
    head_is_embedding,
    heads_normed_after_rotation,
    in_order,
    interleaved,
    interpolated,
    keys,
    keys_before_queries,
    last_dimensions,
    mlp_reads,
    other_list,
    rope,
    rotated_by,
    rotation_and_alibi,
    rounded,
    rows_interleaved,
    scale_of_width_by_heads,
    scaled,
    slopes,
    slow_positions,
    split,
    stored_table,
    swapped,
    without,
)

# `pytest --junitxml FILE` lists the difference that each mutation makes, in units of the tolerance ("observed").
MARGIN = 10


@dataclass(frozen=True)
class Wrong:
    """A checkpoint of the grid, and one wrong reading of it."""

    variant: str
    reading: str
    mutation: Mutation
    match_transformers: bool = True  # False: the mutation is of the default reading

    def __str__(self) -> str:
        return f"{self.variant}: {self.reading}"


BIASES = [f"{part}.bias" for part in "qkvo"]
ALL_SEE_ALL = config(windows=())

WRONG = [
    # Llama: faults known from issue trackers, and each row of the table of tensors
    Wrong("llama-gqa", "no rotation", rotated_by(lambda x, cos, sin: x)),
    Wrong("llama-gqa", "adjacent dimensions rotated together", rotated_by(adjacent_pairs)),
    Wrong("llama-gqa", "rotated in the opposite direction",
          rotated_by(lambda x, cos, sin: TURN(x, cos, sin.roll(8, -1)))),
    Wrong("llama-gqa", "frequencies in bfloat16", frequencies(rounded)),
    Wrong("llama-gqa", "query heads assigned to key heads in turn", groups_interleaved(llama)),
    Wrong("llama-gqa", "as many key heads as query heads", config(kv_heads=lambda c: c.heads)),
    Wrong("llama-mqa", "two key heads", config(kv_heads=2)),
    *(Wrong("llama-biased", f"without {name}", without(f"attention.{name}")) for name in BIASES),
    *(Wrong("llama-biased", f"without {n}.bias", without(f"mlp.{n}.bias")) for n in ("gate", "up", "down")),
    Wrong("llama-attention-bias", "no bias of o", config(output_bias=False)),
    Wrong("llama-attention-bias", "biases in the MLP too", config(mlp_bias=True)),
    Wrong("llama-mlp-bias", "no biases in the MLP", config(mlp_bias=False)),
    Wrong("llama-gelu", "tanh gelu", activation("gelu_pytorch_tanh")),
    Wrong("llama-gelu-tanh", "exact gelu", activation("gelu")),
    Wrong("llama-gelu-tanh", "quick gelu", activation("quick_gelu")),
    Wrong("llama-relu", "silu", activation_of_relu_is_silu),
    Wrong("llama-eps", "eps 1e-5", config(norm_eps=1e-5)),
    Wrong("llama-gqa", "gate and up exchanged", swapped("mlp.gate", "mlp.up")),
    Wrong("llama-gqa", "norms exchanged", swapped("attention_norm", "mlp_norm")),
    Wrong("llama-mha", "keys and values exchanged", swapped("attention.k", "attention.v")),
    Wrong("llama-gqa", "final norm without its weight", without("norm.weight")),
    Wrong("llama-gqa", "untied read as tied", head_is_embedding),
    Wrong("llama-tied", "tied read as untied", config(tied=False)),
    Wrong("llama-wide-head", "head_dim is hidden / heads", keys(head_dim=16)),
    Wrong("llama-wide-head", "scores scaled by hidden / heads", scale_of_width_by_heads),
    Wrong("llama-code", "theta 10000", rope(theta=10000.0)),
    Wrong("llama-old-file", "the stored rotary table", frequencies(stored_table)),
    Wrong("llama-linear", "no factor", frequencies(slow_positions)),
    Wrong("llama-dynamic-grown", "theta does not grow with the length", frequencies(slow_positions)),
    Wrong("llama-dynamic-plain", "theta grows too early", rope(positions=256)),
    Wrong("llama-llama3", "no ramp between the frequencies", rope(high_freq_factor=1.0001)),
    Wrong("llama-llama3", "unscaled", frequencies(slow_positions)),
    Wrong("llama-yarn", "scores not scaled", rope(attention_factor=1.0)),
    Wrong("llama-yarn", "all frequencies interpolated", frequencies(interpolated)),
    Wrong("llama-yarn-mscale", "ends of the ramp rounded", rope(truncate=True)),
    Wrong("llama-longrope-short", "the long list", frequencies(other_list)),
    Wrong("llama-longrope-long", "the short list", frequencies(other_list)),
    Wrong("llama-longrope-short", "scores not scaled", rope(attention_factor=1.0)),
    Wrong("llama-rope-in-three-places", "rope_parameters instead of rope_scaling", keys(rope_scaling=ABSENT)),
    Wrong("llama-rope-in-three-places", "theta from the top level", rope(theta=700.0)),
    Wrong("llama-rope-theta-outside", "the default theta", keys(rope_theta=ABSENT)),
    Wrong("llama-rope-of-two-types", "type instead of rope_type",
          keys(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=256)),
    Wrong("llama-rope-of-two-originals", "the inner one", keys(original_max_position_embeddings=ABSENT)),
    Wrong("llama-scaling-without-type", "linear", keys(rope_scaling={"type": "linear", "factor": 2.0})),
    # Mistral, Qwen2, Qwen3
    Wrong("mistral-v0.1", "no window", ALL_SEE_ALL),
    Wrong("mistral-v0.1", "a window one shorter", config(windows=(39,) * 3)),
    Wrong("mistral-v0.3", "a window although the key is null", config(windows=(512,) * 3)),
    Wrong("mistral-nemo", "a file that no index names", another_file("consolidated.safetensors")),
    Wrong("mistral-kv-heads-absent", "as many as query heads", keys(num_key_value_heads=16)),
    Wrong("mistral-kv-heads-null", "eight, as if the key were absent", keys(num_key_value_heads=8)),
    Wrong("mistral-key-of-llama", "attention_bias honoured", config(attention_bias=True)),
    Wrong("qwen2-0.5b", "a window that use_sliding_window turns off", keys(use_sliding_window=True)),
    Wrong("qwen2-0.5b", "biases ignored", config(attention_bias=False)),
    Wrong("qwen2-0.5b", "tied read as untied", config(tied=False)),
    *(Wrong("qwen2-7b-bfloat16", f"without {name}", without(f"attention.{name}")) for name in BIASES[:3]),
    Wrong("qwen2-7b-bfloat16", "a bias of o", config(output_bias=True)),
    Wrong("qwen2-key-of-llama", "attention_bias honoured", config(attention_bias=False)),
    Wrong("qwen2-kv-heads-absent", "as many as query heads", keys(num_key_value_heads=64)),
    Wrong("qwen2-head-dim", "head_dim ignored", keys(head_dim=ABSENT)),
    Wrong("qwen2-upper-layers-slide", "the lower ones slide", config(windows=(40, None, None))),
    Wrong("qwen2-upper-layers-slide", "all slide", config(windows=(40, 40, 40))),
    Wrong("qwen2-upper-layers-slide", "none slides", ALL_SEE_ALL),
    Wrong("qwen2-layer-types", "windows by max_window_layers", keys(layer_types=ABSENT, max_window_layers=1)),
    Wrong("qwen3-8b", "no norms of the heads", without("attention.q_norm")),
    Wrong("qwen3-8b", "norms of the heads exchanged", swapped("q_norm", "k_norm")),
    Wrong("qwen3-8b", "norms after the rotation", heads_normed_after_rotation),
    Wrong("qwen3-8b", "norms of the heads not expected", config(head_norms=False)),
    Wrong("qwen3-8b", "scores scaled by hidden / heads", scale_of_width_by_heads),
    Wrong("qwen3-head-dim-absent", "hidden / heads", keys(head_dim=16)),
    Wrong("qwen3-biased", "no bias of o", config(output_bias=False)),
    Wrong("qwen3-slides", "none slides", ALL_SEE_ALL),
    # GPT-NeoX
    Wrong("gpt_neox-pythia", "no rotation", rotated_by(lambda x, cos, sin: x)),
    Wrong("gpt_neox-pythia", "all dimensions rotated", keys(rotary_pct=1.0)),
    Wrong("gpt_neox-pythia", "the last dimensions rotated", rotated_by(last_dimensions)),
    Wrong("gpt_neox-pythia", "the stored rotary table", frequencies(stored_table)),
    Wrong("gpt_neox-pythia", "three blocks", split(blocks)),
    Wrong("gpt_neox-pythia", "rows interleaved", split(rows_interleaved)),
    Wrong("gpt_neox-pythia", "queries and keys exchanged", swapped("attention.q", "attention.k")),
    Wrong("gpt_neox-pythia", "sequential", config(parallel=False)),
    Wrong("gpt_neox-pythia", "one norm for both", mlp_reads(lambda block, x, normed: normed)),
    Wrong("gpt_neox-pythia", "norms exchanged", swapped("attention_norm", "mlp_norm")),
    Wrong("gpt_neox-pythia", "tanh gelu", activation("gelu_pytorch_tanh")),
    Wrong("gpt_neox-20b", "exact gelu", activation("gelu")),
    Wrong("gpt_neox-gelu-new", "exact gelu", activation("gelu")),
    Wrong("gpt_neox-20b", "sequential when the key is absent", config(parallel=False)),
    Wrong("gpt_neox-20b", "no biases when the key is absent", config(attention_bias=False)),
    Wrong("gpt_neox-redpajama", "parallel", config(parallel=True)),
    Wrong("gpt_neox-redpajama", "a quarter rotated", keys(rotary_pct=0.25)),
    Wrong("gpt_neox-odd-rotary", "four dimensions", rope(dim=4)),
    Wrong("gpt_neox-odd-rotary", "six dimensions", rope(dim=6)),
    Wrong("gpt_neox-other-families-keys", "rope_theta", keys(rotary_emb_base=77.0)),
    Wrong("gpt_neox-other-families-keys", "partial_rotary_factor", keys(rotary_pct=0.5)),
    Wrong("gpt_neox-quarter-by-default", "all dimensions", keys(rotary_pct=1.0)),
    Wrong("gpt_neox-quarter-by-default", "the default theta", rope(theta=10000.0)),
    *(Wrong("gpt_neox-sequential", f"without {name}", without(f"attention.{name}")) for name in BIASES),
    *(Wrong("gpt_neox-sequential", f"without {n}.bias", without(f"{n}.bias"))
      for n in ("mlp.up", "mlp.down", "attention_norm", "mlp_norm", "0.attention_norm")),
    Wrong("gpt_neox-eps", "eps 1e-5", config(norm_eps=1e-5)),
    Wrong("gpt_neox-tied", "untied", config(tied=False)),
    Wrong("gpt_neox-linear", "no factor", frequencies(slow_positions)),
    Wrong("gpt_neox-no-attention-bias", "biases expected", config(attention_bias=True)),
    # Falcon
    Wrong("falcon-7b", "no rotation", rotated_by(lambda x, cos, sin: x)),
    Wrong("falcon-7b", "alibi", config(position=Alibi(4))),
    Wrong("falcon-7b", "as many key heads as num_kv_heads says", config(kv_heads=lambda c: c.heads)),
    Wrong("falcon-7b", "keys before queries", split(keys_before_queries)),
    Wrong("falcon-7b", "keys and values exchanged", swapped("attention.k", "attention.v")),
    Wrong("falcon-7b", "sequential", config(parallel=False, shared_norm=False)),
    Wrong("falcon-7b", "separate norms", config(shared_norm=False)),
    Wrong("falcon-7b", "tanh gelu", activation("gelu_pytorch_tanh")),
    Wrong("falcon-7b", "untied", config(tied=False)),
    Wrong("falcon-7b-old", "n_layer and n_head not read", keys(n_layer=ABSENT, n_head=ABSENT)),
    Wrong("falcon-40b-old", "untied when the key is absent", config(tied=False)),
    Wrong("falcon-7b-sequential", "parallel", config(parallel=True)),
    *(Wrong("falcon-7b-biased", f"without {name}", without(f"attention.{name}")) for name in BIASES),
    *(Wrong("falcon-7b-biased", f"without {n}.bias", without(f"mlp.{n}.bias")) for n in ("up", "down")),
    Wrong("falcon-7b-biased", "no biases", config(bias=False)),
    Wrong("falcon-7b-biased", "an MLP of 4 times the width", keys(ffn_hidden_size=ABSENT)),
    Wrong("falcon-separate-heads", "three blocks", split(blocks)),
    Wrong("falcon-separate-heads", "rows interleaved", split(rows_interleaved)),
    Wrong("falcon-n-embed", "hidden_size counts", keys(n_embed=ABSENT)),
    Wrong("falcon-relu", "gelu", activation("gelu")),
    Wrong("falcon-eps", "eps 1e-5", config(norm_eps=1e-5)),
    Wrong("falcon-40b", "three blocks", split(blocks)),
    Wrong("falcon-40b", "keys before queries", split(keys_before_queries)),
    Wrong("falcon-40b", "query heads assigned to key heads in turn", groups_interleaved(falcon)),
    Wrong("falcon-40b", "norms exchanged", swapped("attention_norm", "mlp_norm")),
    Wrong("falcon-40b", "one norm for both", config(shared_norm=True)),
    Wrong("falcon-40b", "sequential", config(parallel=False)),
    Wrong("falcon-40b", "one key head", config(kv_heads=1)),
    Wrong("falcon-40b", "four key heads", config(kv_heads=4)),
    Wrong("falcon-40b-old", "n_head_kv does not imply groups", keys(new_decoder_architecture=False)),
    Wrong("falcon-40b-mixed", "old spellings not read",
          keys(n_head_kv=ABSENT, n_head=ABSENT, n_layer=ABSENT)),
    Wrong("falcon-40b-wizard", "multi_query honoured",
          keys(new_decoder_architecture=False, multi_query=True)),
    Wrong("falcon-11b", "two norms", keys(num_ln_in_parallel_attn=ABSENT)),
    Wrong("falcon-11b", "tied", head_is_embedding),
    Wrong("falcon-11b", "theta 10000", keys(rope_parameters=ABSENT)),
    Wrong("falcon-rw-1b", "alibi twice", scaled(falcon, 2.0)),
    Wrong("falcon-rw-1b", "alibi added after scaling", scaled(falcon, 8**0.5)),
    Wrong("falcon-rw-1b", "alibi with the opposite sign", scaled(falcon, -1.0)),
    Wrong("falcon-rw-1b", "no alibi", scaled(falcon, 0.0)),
    Wrong("falcon-rw-1b", "rotation", config(position=rotary.Rope(10000.0, 8))),
    Wrong("falcon-rw-1b", "rotation and alibi", rotation_and_alibi),
    Wrong("falcon-rw-1b", "parallel", config(parallel=True)),
    Wrong("falcon-rw-1b", "one key head", config(kv_heads=1)),
    Wrong("falcon-rw-1b", "three blocks", split(blocks)),
    Wrong("falcon-rw-12-heads", "alibi in float32, where transformers rounds to bfloat16",
          config(position=lambda c: replace(c.position, bfloat16_ranks=False))),
    Wrong("falcon-rw-12-heads", "alibi rounded in the default reading",
          config(position=lambda c: replace(c.position, bfloat16_ranks=True)), match_transformers=False),
    Wrong("falcon-rw-12-heads", "slopes spread evenly", slopes(evenly)),
    Wrong("falcon-rw-12-heads", "slopes sorted", slopes(in_order)),
    Wrong("falcon-rw-5-heads", "slopes in the wrong order", slopes(between_first)),
    # MPT
    Wrong("mpt-7b", "q, k, v of each head in turn", split(interleaved)),
    Wrong("mpt-7b", "rows interleaved", split(rows_interleaved)),
    Wrong("mpt-7b", "queries and keys exchanged", swapped("attention.q", "attention.k")),
    Wrong("mpt-7b", "no alibi", scaled(mpt, 0.0)),
    Wrong("mpt-7b", "alibi with the opposite sign", scaled(mpt, -1.0)),
    Wrong("mpt-7b", "alibi added before scaling", scaled(mpt, 8**-0.5)),
    Wrong("mpt-7b", "norms exchanged", swapped("attention_norm", "mlp_norm")),
    Wrong("mpt-7b", "tanh gelu", activation("gelu_pytorch_tanh")),
    Wrong("mpt-7b", "untied when the key is absent", config(tied=False)),
    Wrong("mpt-7b", "an MLP of twice the width", config(mlp_width=128)),
    Wrong("mpt-12-heads", "slopes spread evenly", slopes(evenly)),
    Wrong("mpt-12-heads", "slopes sorted", slopes(in_order)),
    Wrong("mpt-5-heads", "slopes in the wrong order", slopes(between_first)),
    Wrong("mpt-clipped", "not clipped", config(clip_qkv=None)),
    Wrong("mpt-softmax-scale", "scores scaled by the head dimension", config(softmax_scale=8**-0.5)),
    Wrong("mpt-eps", "eps 1e-5", config(norm_eps=1e-5)),
    Wrong("mpt-untied", "tied", head_is_embedding),
    Wrong("mpt-storywriter", "alibi_bias_max honoured, where transformers ignores it",
          config(alibi=Alibi(8, bias_max=16.0))),
    Wrong("mpt-storywriter", "alibi_bias_max ignored in the default reading", config(alibi=Alibi(8)),
          match_transformers=False),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_parity_notices_a_wrong_reading(
    wrong: Wrong, cases: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    case = cases(wrong.variant)
    wrong.mutation(monkeypatch)
    try:
        difference = case.distance(wrong.match_transformers) / TOLERANCE
    except CheckpointError as refusal:
        record_property("observed", str(refusal))
        return
    record_property("observed", difference)
    nan = difference != difference
    assert nan or difference > MARGIN, f"{wrong} changes the logits by {difference:.2f} times the tolerance"
