"""Checkpoints that are unusual but valid: they load and compute the same as the usual one."""

import json
import struct
import warnings

import pytest
import torch
from safetensors.torch import save

import streamllm
from tests import tiny
from tests.tiny import INDEX, SINGLE
from tests.unit.hostile.samples import (
    EMBED,
    HEAD,
    INTACT,
    NAN,
    NORM,
    SHARDED,
    SHARDS,
    TENSORS,
    Files,
    build,
    link,
    load_and_run,
    safetensors,
    with_config,
    with_index,
    with_tensors,
)

BASE_ONLY = {name.removeprefix("model."): tensor for name, tensor in TENSORS.items()}
JUNK = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": NAN,
    "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=torch.int64),
}


def unaligned() -> bytes:
    """The weights with a header whose length is not a multiple of 8, so that no tensor is aligned."""
    data = INTACT[SINGLE]
    size = struct.unpack("<Q", data[:8])[0]
    return safetensors(data[8 : 8 + size].rstrip() + b" " * 3, data[8 + size :])


UNUSUAL: dict[str, Files] = {
    "sharded": SHARDED,
    "shards in a folder": {
        (f"parts/{name}" if name in SHARDS else name): data
        for name, data in with_index(
            {n: f"parts/{s}" for n, s in json.loads(SHARDED[INDEX])["weight_map"].items()}
        ).items()
    },
    "wrong total_size": with_index(metadata={"total_size": -1}),
    "metadata without meaning": with_index(metadata=[{}]),
    "a tensor that the map lacks": with_index({NORM: None}),
    "a tensor mapped to another shard": with_index({NORM: SHARDS[0], EMBED: SHARDS[2]}),
    "stored rotary tables": with_tensors(JUNK),
    "without prefix": INTACT | {SINGLE: save(BASE_ONLY)},
    "float64 on disk": INTACT | {SINGLE: save({name: tensor.double() for name, tensor in TENSORS.items()})},
    "mixed types on disk": with_tensors({NORM: TENSORS[NORM].double()}),
    "unaligned tensors": INTACT | {SINGLE: unaligned()},
    "a link inside the folder": INTACT | {SINGLE: link("weights"), "weights": INTACT[SINGLE]},
    "unknown keys of the config": with_config(
        auto_map={"AutoModel": "evil.Model"}, nonsense=[[[]]], pretraining_tp=2
    ),
    "no dtype": with_config(torch_dtype=None),
    "the dtype's new name": with_config(torch_dtype=None, dtype="float32"),
    "rope as version 5 writes it": with_config(
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    ),
    "an unused shard": SHARDED | {"model-00009-of-00003.safetensors": b"?"},
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_checkpoints_load(tmp_path, case, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(load_and_run(build(tmp_path, UNUSUAL[case])), expected, rtol=0, atol=1e-5)


TIED = with_tensors({HEAD: TENSORS[EMBED]})


@pytest.mark.parametrize("kept", [(EMBED, HEAD), (EMBED,), (HEAD,)], ids=["both", "embedding", "head"])
def test_tied_head(tmp_path, kept):
    alone = {name: tensor for name, tensor in TENSORS.items() if name not in (EMBED, HEAD)}
    files = with_config(tie_word_embeddings=True) | {
        SINGLE: save(alone | {name: TENSORS[EMBED].clone() for name in kept})
    }
    untied = load_and_run(build(tmp_path / "untied", TIED))
    torch.testing.assert_close(load_and_run(build(tmp_path / "tied", files)), untied, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1e300},
        {"rope_scaling": {"type": "linear", "factor": 1e300}},
        {"rope_scaling": {"type": "yarn", "factor": 1e300}},
        {"rope_scaling": {"type": "dynamic", "factor": 1e300}},
        {"rope_scaling": {"type": "linear", "factor": 10**30}},
        {"rope_theta": 2**64},
        {"max_position_embeddings": 1},
        {"rms_norm_eps": 1e300},
    ],
    ids=str,
)
def test_extreme_values_give_finite_logits(tmp_path, changes):
    assert load_and_run(build(tmp_path, with_config(**changes))).isfinite().all()


def test_config_ties_a_head_that_the_files_hold_apart(tmp_path, expected):
    with pytest.warns(UserWarning, match="ties the head .* but the files have another head"):
        found = load_and_run(build(tmp_path, with_config(tie_word_embeddings=True)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_values_that_are_not_finite_cause_a_warning(tmp_path, value):
    broken = TENSORS[NORM].clone()
    broken[3] = float(value)
    with pytest.warns(UserWarning, match=r"values that are not finite in model.norm.weight"):
        load_and_run(build(tmp_path, with_tensors({NORM: broken})))


def test_values_too_large_for_the_type_cause_a_warning(tmp_path):
    files = with_config(torch_dtype="float16") | {SINGLE: save(TENSORS | {NORM: torch.full((16,), 1e5)})}
    with pytest.warns(UserWarning, match="not finite in model.norm.weight"):
        streamllm.load(build(tmp_path, files))


def test_tokenizer_larger_than_the_embedding_causes_a_warning(tmp_path):
    small = tiny.tensors({"vocab_size": 200})
    with pytest.warns(UserWarning, match=r"tokenizer has 258 tokens, the model only 200"):
        streamllm.load(build(tmp_path, with_config(vocab_size=200) | {SINGLE: save(small)}))
