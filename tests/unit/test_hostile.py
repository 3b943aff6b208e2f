"""Broken and hostile checkpoints: each ends in our own exception with one sentence, or in a correct load.

Never in another exception, a hang, memory out of proportion to the files, or a wrong model without a word.
"""

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import streamllm
from streamllm import CheckpointError, TokenizerError
from tests import tiny
from tests.tiny import CONFIG, INDEX, SINGLE

Files = dict[str, Any]  # name -> bytes, or a function that makes something else at that path
SECONDS = 10
MEGABYTES = (
    50  # of memory beyond what was there before; and 12 times the files, for what Python makes of JSON
)

WHOLE = tiny.checkpoint()
SHARDED = tiny.checkpoint(shards=3)
SHARDS = sorted(name for name in SHARDED if name.startswith("model-"))
TENSORS = tiny.tensors()
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def peak() -> int:
    """The largest resident memory since the last `forget_peak`, in megabytes."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) // 1024


def forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def attempt(folder: Path) -> torch.Tensor:
    """Loads, within bounds, and says something: the logits after "streams"."""
    measured = forget_peak()
    before = peak()
    try:
        model, tokenizer = streamllm.load(folder, device="cpu")
        return model(torch.tensor([tokenizer.encode("streams")]))[0, -1].detach()
    finally:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) >> 20
        assert not measured or peak() - before < MEGABYTES + 12 * size


class Late(BaseException):
    """No Exception, which somebody might take for a broken file."""


@pytest.fixture(autouse=True)
def in_time():
    """Ten seconds of work at the most; by the clock much more, because others may work here, too."""

    def late(*args):
        raise Late

    old = [signal.signal(signal.SIGPROF, late), signal.signal(signal.SIGALRM, late)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(20 * SECONDS)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.alarm(0)
    signal.signal(signal.SIGPROF, old[0])
    signal.signal(signal.SIGALRM, old[1])


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    return attempt(tiny.write(tmp_path_factory.mktemp("right"), WHOLE))


def build(folder: Path, files: Files) -> Path:
    made = {name: value for name, value in files.items() if callable(value)}
    tiny.write(folder, {name: value for name, value in files.items() if isinstance(value, bytes)})
    for name, make in made.items():
        make(folder / name)
    return folder


def refused(folder: Path, files: Files, pattern: str) -> None:
    with pytest.raises((CheckpointError, TokenizerError), match=pattern) as caught:
        attempt(build(folder, files))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000


# Ways to break things.


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int) -> bytes:
    return b'{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}' % (start, start + 4)


def lying(**changes: Any) -> bytes:
    """The whole model's file, with one entry of its header changed: `None` removes a key."""
    data = WHOLE[SINGLE]
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    for key, value in changes.items():
        header[NORM][key] = value
        if value is None:
            del header[NORM][key]
    return safetensors(header, data[8 + size :])


def with_tensors(changes: dict[str, torch.Tensor | None]) -> Files:
    kept = {name: tensor.clone() for name, tensor in (TENSORS | changes).items() if tensor is not None}
    return WHOLE | {SINGLE: save(kept)}


def config(**changes: Any) -> Files:
    return WHOLE | {"config.json": json.dumps(CONFIG | changes).encode()}


def index(changes: dict[str, Any] | None = None, **top: Any) -> Files:
    """The sharded checkpoint with another index; a None in `changes` removes a tensor from its map."""
    places = json.loads(SHARDED[INDEX])["weight_map"] | (changes or {})
    places = {name: shard for name, shard in places.items() if shard is not None}
    return SHARDED | {INDEX: json.dumps({"weight_map": places} | top).encode()}


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def without(files: Files, *names: str) -> Files:
    return {name: data for name, data in files.items() if name not in names}


DEEP, BRACKETS = b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"[" * 200_000
NAN = torch.full((16,), float("nan"))
NORM1 = "input_layernorm.weight"
GENERATION, TOKENIZER = "generation_config.json", "tokenizer.json"
PIECES = without(WHOLE, TOKENIZER)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
WHAT = "is not a whole safetensors file"

# What is wrong with the weights' file itself: it is not a whole safetensors file.
NOT_WHOLE = {
    "empty": b"",
    "seven bytes": b"1234567",
    "no header": struct.pack("<Q", 0),
    "header longer than the file": safetensors({}, length=10**6),
    "header of 2^63 bytes": safetensors({}, length=2**63),
    "header of 2^64-1 bytes": safetensors({}, length=2**64 - 1),
    "header is no JSON": safetensors(b"{nothing"),
    "header is a list": safetensors([1, 2, 3]),
    "header is no UTF-8": safetensors(b'{"\xff\xfe":1}'),
    "header nested deeply": safetensors(DEEP),
    "header of brackets": safetensors(BRACKETS),
    "data without tensors": safetensors({}, b"12345678"),
    "one byte short": WHOLE[SINGLE][:-1],
    "half": WHOLE[SINGLE][: len(WHOLE[SINGLE]) // 2],
    "one byte more": WHOLE[SINGLE] + b"\0",
    "overlapping tensors": lying(data_offsets=[0, 64]),
    "offsets beyond the file": lying(data_offsets=[10**9, 10**9 + 64]),
    "offsets of 2^63": lying(data_offsets=[2**63, 2**63 + 64]),
    "offsets backwards": lying(data_offsets=[64, 0]),
    "offsets below zero": lying(data_offsets=[-64, 0]),
    "offsets are no whole numbers": lying(data_offsets=[0.5, 64.5]),
    "three offsets": lying(data_offsets=[0, 64, 128]),
    "no offsets": lying(data_offsets=None),
    "shape larger than its data": lying(shape=[17]),
    "shape of 2^66": lying(shape=[2**33, 2**33]),
    "shape below zero": lying(shape=[-16]),
    "shape is text": lying(shape="16"),
    "no such dtype": lying(dtype="F31"),
    "a dtype of many words": lying(dtype="F31\n" * 1000),
    "wider dtype": lying(dtype="F64"),
    "metadata is no text": safetensors({"__metadata__": {"a": [1]}}),
    "a name twice": safetensors(b'{"a":%b,"a":%b}' % (entry(0), entry(4)), b"12345678"),
    "a web page": b"<!doctype html><title>504 Gateway Time-out</title>" * 10,
}

# What is wrong with its tensors.
TENSOR_CASES = {
    "one missing": ({NORM: None}, "lack the weights of norm.weight"),
    "a layer missing": ({name: None for name in TENSORS if ".1." in name}, "lack the weights of layers.1"),
    "the head missing": ({HEAD: None}, "lack the weights of head.weight"),
    "all missing": (dict.fromkeys(TENSORS) | {"x": NAN}, "2 layers, but there are only 1 tensors"),
    "unknown": ({"model.surprise": NAN}, "no place for model.surprise"),
    "a layer too many": ({"model.layers.2." + NORM1: NAN}, "no place for model.layers.2"),
    "layer 999999999": ({"model.layers.999999999." + NORM1: NAN}, "no place for model.layers.9"),
    "layer 01": ({"model.layers.01." + NORM1: NAN}, "no place for model.layers.01"),
    "layer -1": ({"model.layers.-1." + NORM1: NAN}, "no place for model.layers.-1"),
    "an evil name": ({"../\n\x1b[2J" + "x" * 5000: NAN}, "no place for"),
    "another prefix": ({"transformer." + name: NAN for name in TENSORS}, "no place for"),
    "under two names": ({"norm.weight": NAN}, "twice, under two names"),
    "misshapen": ({NORM: torch.ones(17)}, r"norm.weight has the shape \[17\], .* must have \[16\]"),
    "transposed": ({EMBED: torch.ones(16, 258)}, r"shape \[16, 258\], .* must have \[258, 16\]"),
    "a scalar": ({NORM: torch.tensor(1.0)}, r"has the shape \[\]"),
    "nothing in it": ({NORM: torch.ones(0)}, r"has the shape \[0\]"),
    "a thousand dimensions": ({NORM: torch.ones([16] + [1] * 60)}, r"has the shape \[16, 1, 1"),
    "whole numbers": ({NORM: torch.ones(16, dtype=torch.int64)}, "stored as I64; supported: F64"),
    "eight bits": ({NORM: torch.ones(16).to(torch.float8_e4m3fn)}, "stored as F8_E4M3; supported: F64"),
}

# What is wrong with the index: changes of its map, or its whole text.
INDEXES: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    "no JSON": (b"{", "is not valid JSON"),
    "a list": (b"[]", "must hold a JSON object"),
    "nested deeply": (DEEP, "nested too deeply"),
    "of brackets": (BRACKETS, "more lists and objects than"),
    "without a map": (b"{}", "has no weight_map"),
    "with an empty map": (b'{"weight_map": {}}', "has no weight_map"),
    "map is a list": (b'{"weight_map": ["a"]}', "has no weight_map"),
    "shard is a number": ({NORM: 7}, "must map names of tensors to names of files"),
    "shard is a list": ({NORM: [SHARDS[0]]}, "must map names of tensors to names of files"),
    "shard is not there": ({NORM: "gone.safetensors"}, "has no file 'gone.safetensors'"),
    "shard is the config": ({NORM: "config.json"}, WHAT),
    "shard is the index": ({NORM: INDEX}, WHAT),
    "shard is empty text": ({NORM: ""}, "file name '' is empty"),
    "shard above": ({NORM: "../model.safetensors"}, "climbs out with '..'"),
    "shard above and back": ({NORM: "x/../../x.safetensors"}, "climbs out with '..'"),
    "shard at the root": ({NORM: "/etc/passwd"}, "is an absolute path"),
    "shard on a drive": ({NORM: "C:\\x.safetensors"}, "backslash or a drive"),
    "shard with a NUL": ({NORM: "x\0.safetensors"}, "control characters"),
    "shard with half a character": ({NORM: "\ud800.safetensors"}, "control characters"),
    "shard with a long name": ({NORM: "x" * 10_000}, "is too long"),
    "a tensor that no shard has": (
        {"surprise": SHARDS[0]},
        "the index promises surprise, which no shard has",
    ),
}

# What lies where a file should be.
PLACES: dict[str, tuple[Files, str, Any, str]] = {
    "weights: a folder": (WHOLE, SINGLE, Path.mkdir, "is a folder, not a file"),
    "weights: a pipe": (WHOLE, SINGLE, os.mkfifo, "is a pipe or a device, not a file"),
    "weights: a device": (WHOLE, SINGLE, link("/dev/zero"), "is a link out of the folder"),
    "weights: a link out": (WHOLE, SINGLE, link("/etc/hostname"), "is a link out of the folder"),
    "weights: a link to nothing": (WHOLE, SINGLE, link("gone"), "is a link to nothing"),
    "weights: a pointer": (WHOLE, SINGLE, LFS, "is a pointer of git-lfs, not the file itself; run 'git lfs"),
    "weights: nothing": (WHOLE, SINGLE, None, "has no weights: neither model.safetensors nor"),
    "shard: half": (SHARDED, SHARDS[1], SHARDED[SHARDS[1]][:500], WHAT),
    "shard: a folder": (SHARDED, SHARDS[1], Path.mkdir, "is a folder, not a file"),
    "shard: a pipe": (SHARDED, SHARDS[1], os.mkfifo, "is a pipe or a device, not a file"),
    "shard: a link out": (SHARDED, SHARDS[1], link("/etc/hostname"), "is a link out of the folder"),
    "shard: a loop": (SHARDED, SHARDS[1], link(SHARDS[1]), "cannot read"),
    "shard: nothing": (SHARDED, SHARDS[1], None, f"has no file '{SHARDS[1]}'"),
    "config: a pipe": (WHOLE, "config.json", os.mkfifo, "is a pipe or a device, not a file"),
    "config: a link out": (WHOLE, "config.json", link("/etc/hostname"), "is a link out of the folder"),
    "config: nothing": (WHOLE, "config.json", None, "has no config.json"),
    "config: empty": (WHOLE, "config.json", b"", "is not valid JSON"),
    "config: a list": (WHOLE, "config.json", b"[]", "must hold a JSON object"),
    "config: Latin-1": (WHOLE, "config.json", b'{"model_type": "\xe9"}', "cannot be read as text"),
    "config: nested deeply": (WHOLE, "config.json", DEEP, "nested too deeply"),
    "config: 9,999 digits": (WHOLE, "config.json", b'{"layers": %b}' % (b"9" * 9_999), "not valid JSON"),
    "generation: no JSON": (WHOLE, GENERATION, b"{", "is not valid JSON"),
    "generation: a list": (WHOLE, GENERATION, b"[]", "must hold a JSON object"),
    "generation: a link out": (WHOLE, GENERATION, link("/etc/hostname"), "is a link out of the folder"),
    "generation: eos in words": (WHOLE, GENERATION, b'{"eos_token_id": "</s>"}', "eos_token_id is"),
    "generation: a cold one": (WHOLE, GENERATION, b'{"do_sample": true, "temperature": -1}', "temperature"),
    "generation: a NaN": (WHOLE, GENERATION, b'{"do_sample": true, "top_p": NaN}', "top_p"),
    "generation: a list of sizes": (WHOLE, GENERATION, b'{"do_sample": true, "top_k": [1]}', "top_k"),
    "tokenizer: nothing": (WHOLE, TOKENIZER, None, "has no tokenizer"),
    "tokenizer: empty": (WHOLE, TOKENIZER, b"", "tokenizer.json"),
    "tokenizer: a list": (WHOLE, TOKENIZER, b"[]", "tokenizer.json"),
    "tokenizer: nested deeply": (WHOLE, TOKENIZER, DEEP, "tokenizer.json"),
    "tokenizer: brackets": (WHOLE, TOKENIZER, BRACKETS, "tokenizer.json"),
    "tokenizer: a link out": (WHOLE, TOKENIZER, link("/etc/hostname"), "is a link out of the folder"),
    "tokenizer: a pipe": (WHOLE, TOKENIZER, os.mkfifo, "is a pipe or a device, not a file"),
    "tokenizer config: a list": (WHOLE, "tokenizer_config.json", b"[]", "tokenizer_config.json"),
    "tokenizer config: nested": (WHOLE, "tokenizer_config.json", DEEP, "tokenizer_config.json"),
    "tokenizer config: a link out": (WHOLE, "tokenizer_config.json", link("/etc/hostname"), "is a link out"),
    "sentencepiece: noise": (PIECES, "tokenizer.model", b"\x0a\xff\xff\xff\xff\x0f" * 50, "tokenizer.model"),
    "sentencepiece: empty": (PIECES, "tokenizer.model", b"", "tokenizer.model"),
}  # fmt: skip

# What config.json can say: UnsupportedConfig with the key and its value, or CheckpointError where the files
# disagree.
HUGE = 10**400  # no float holds it
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no model_type": ({"model_type": None}, "model_type is None; supported: .*llama"),
    "model_type is a list": ({"model_type": ["llama"]}, "model_type is"),
    "model_type of another world": ({"model_type": "gptj"}, "model_type is 'gptj'; supported"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "a billion layers of a kin": (
        {"model_type": "mistral", "num_hidden_layers": 10**9},
        "num_hidden_layers is 1000000000; supported",
    ),
    "a billion layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; supported"),
    "a thousand layers": ({"num_hidden_layers": 1000}, "1000 layers, but there are only 21 tensors"),
    "half a layer": ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
    "layers in words": ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
    "layers are true": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "width of 2^62": ({"hidden_size": 2**62}, "hidden_size is"),
    "width below zero": ({"hidden_size": -16}, "hidden_size is -16"),
    "width of infinity": ({"hidden_size": float("inf")}, "hidden_size is inf"),
    "sizes that overflow": ({"hidden_size": 2**30, "head_dim": 2**30}, "sizes make no model|has the shape"),
    "a vocabulary of 2^31 - 1": ({"vocab_size": 2**31 - 1}, "has the shape"),
    "heads that do not divide": ({"num_attention_heads": 3}, "num_attention_heads is 3"),
    "key heads that do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "an odd head": ({"head_dim": 3}, "head_dim is 3"),
    "eps below zero": ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
    "eps is NaN": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "eps of 10^400": ({"rms_norm_eps": HUGE}, "rms_norm_eps is 1000"),
    "theta is 0": ({"rope_theta": 0}, "rope_theta is 0"),
    "theta of 10^400": ({"rope_theta": HUGE}, "rope_theta is 1000"),
    "activation of another world": ({"hidden_act": "swiglu"}, "hidden_act is 'swiglu'"),
    "activation is a list": ({"hidden_act": ["silu"]}, "hidden_act is"),
    "dtype of another world": ({"torch_dtype": "float3"}, "torch_dtype is 'float3'"),
    "scaling is text": ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
    "scaling of another world": ({"rope_scaling": {"type": "magic"}}, "type is 'magic'"),
    "scaling by 0": ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
    "scaling by 10^400": ({"rope_scaling": {"type": "linear", "factor": HUGE}}, "factor is 1000"),
    "divisors of one": ({"rope_scaling": {"type": "longrope", "short_factor": [1]}}, "short_factor is"),
    "divisors of 0": ({"rope_scaling": {"type": "longrope", "short_factor": [0] * 2}}, "short_factor is"),
}


@pytest.mark.parametrize("case", NOT_WHOLE)
def test_files_that_are_not_whole(tmp_path, case):
    refused(tmp_path, WHOLE | {SINGLE: NOT_WHOLE[case]}, WHAT)


@pytest.mark.parametrize("case", TENSOR_CASES)
def test_tensors(tmp_path, case):
    refused(tmp_path, with_tensors(TENSOR_CASES[case][0]), TENSOR_CASES[case][1])


@pytest.mark.parametrize("case", INDEXES)
def test_indexes(tmp_path, case):
    change, pattern = INDEXES[case]
    refused(tmp_path, SHARDED | {INDEX: change} if isinstance(change, bytes) else index(change), pattern)


@pytest.mark.parametrize("case", PLACES)
def test_places(tmp_path, case):
    files, name, thing, pattern = PLACES[case]
    refused(tmp_path, without(files, name) | ({} if thing is None else {name: thing}), pattern)


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(tmp_path, case):
    refused(tmp_path, config(**CONFIGS[case][0]), CONFIGS[case][1])


def test_an_adapter(tmp_path):
    files = without(WHOLE, "config.json") | {"adapter_config.json": b"{}"}
    refused(tmp_path, files, "holds an adapter only; merge it")


# Odd, and right all the same.

BASE_ONLY = {name.removeprefix("model."): tensor for name, tensor in TENSORS.items()}
JUNK = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": NAN,
    "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=torch.int64),
}
ODD: dict[str, Files] = {
    "sharded": SHARDED,
    "shards in a folder": {
        (f"parts/{name}" if name in SHARDS else name): data
        for name, data in index(
            {n: f"parts/{s}" for n, s in json.loads(SHARDED[INDEX])["weight_map"].items()}
        ).items()
    },
    "wrong total_size": index(metadata={"total_size": -1}),
    "metadata of nonsense": index(metadata=[{}]),
    "a tensor that the map forgot": index({NORM: None}),
    "a tensor mapped to another shard": index({NORM: SHARDS[0], EMBED: SHARDS[2]}),
    "stored rotary tables": with_tensors(JUNK),
    "without prefix": WHOLE | {SINGLE: save(BASE_ONLY)},
    "float64 on disk": WHOLE | {SINGLE: save({name: tensor.double() for name, tensor in TENSORS.items()})},
    "mixed types on disk": with_tensors({NORM: TENSORS[NORM].double()}),
    "header that is not aligned": WHOLE | {SINGLE: WHOLE[SINGLE]},
    "a link inside": WHOLE | {SINGLE: link("weights"), "weights": WHOLE[SINGLE]},
    "keys of other worlds": config(auto_map={"AutoModel": "evil.Model"}, nonsense=[[[]]], pretraining_tp=2),
    "no dtype": config(torch_dtype=None),
    "the dtype's new name": config(torch_dtype=None, dtype="float32"),
    "rope as version 5 writes it": config(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "an unused shard": SHARDED | {"model-00009-of-00003.safetensors": b"?"},
}


def unaligned() -> bytes:
    data = WHOLE[SINGLE]
    size = struct.unpack("<Q", data[:8])[0]
    return safetensors(data[8 : 8 + size].rstrip() + b" " * 3, data[8 + size :])


ODD["header that is not aligned"] = WHOLE | {SINGLE: unaligned()}


@pytest.mark.parametrize("case", ODD)
def test_odd_but_right(tmp_path, case, right):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(attempt(build(tmp_path, ODD[case])), right, rtol=0, atol=1e-5)


TIED = with_tensors({HEAD: TENSORS[EMBED]})


@pytest.mark.parametrize("kept", [(EMBED, HEAD), (EMBED,), (HEAD,)], ids=["both", "embedding", "head"])
def test_tied(tmp_path, kept, right):
    alone = {name: tensor for name, tensor in TENSORS.items() if name not in (EMBED, HEAD)}
    files = config(tie_word_embeddings=True) | {
        SINGLE: save(alone | {name: TENSORS[EMBED].clone() for name in kept})
    }
    untied = attempt(build(tmp_path / "untied", TIED))
    torch.testing.assert_close(attempt(build(tmp_path / "tied", files)), untied, rtol=0, atol=1e-5)


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
def test_extreme_and_finite(tmp_path, changes):
    assert attempt(build(tmp_path, config(**changes))).isfinite().all()


def test_tied_in_words_only(tmp_path, right):
    with pytest.warns(UserWarning, match="ties the head .* but the file has another head"):
        found = attempt(build(tmp_path, config(tie_word_embeddings=True)))
    torch.testing.assert_close(found, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_values_that_are_not_finite(tmp_path, value):
    broken = TENSORS[NORM].clone()
    broken[3] = float(value)
    with pytest.warns(UserWarning, match=r"values that are not finite in model.norm.weight"):
        attempt(build(tmp_path, with_tensors({NORM: broken})))


def test_values_too_large_for_the_type(tmp_path):
    files = config(torch_dtype="float16") | {SINGLE: save(TENSORS | {NORM: torch.full((16,), 1e5)})}
    with pytest.warns(UserWarning, match="not finite in model.norm.weight"):
        streamllm.load(build(tmp_path, files))


def test_a_tokenizer_larger_than_the_embedding(tmp_path):
    small = tiny.tensors({"vocab_size": 200})
    with pytest.warns(UserWarning, match=r"tokenizer knows 258 tokens, the model 200"):
        streamllm.load(build(tmp_path, config(vocab_size=200) | {SINGLE: save(small)}))


HALF = b'"\\ud83d"'  # half of a surrogate pair, which JSON can spell and no library takes


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_half_a_character_as_a_token(tmp_path, kind):
    files = WHOLE
    if kind == "sentencepiece":
        import sentencepiece

        made = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["one two three four"] * 9),
            model_writer=made,
            vocab_size=270,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=9,
        )
        files = PIECES | {"tokenizer.model": made.getvalue()}
        refused(
            tmp_path / "added",
            files | {"added_tokens.json": b"{" + HALF + b": 270}"},
            "added token .* has id 270; a token is some text",
        )
    named = files | {
        "tokenizer_config.json": b'{"unk_token": ' + HALF + b"}",
        "special_tokens_map.json": b"{}",
    }
    tokenizer = streamllm.load_tokenizer(build(tmp_path / "named", named))
    assert tokenizer.token_to_id("\ud83d") is None
    assert tokenizer.decode(tokenizer.encode("two")).strip() == "two"


def test_no_code_of_the_checkpoint_runs(tmp_path):
    """Not from a module that the config names, and not from a pickle beside the weights or instead of
    them."""
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')".encode()
    pickle = b"cbuiltins\nexec\n(V" + code + b"\ntR."
    evil = {
        "modeling_evil.py": code,
        "configuration_evil.py": code,
        "__init__.py": code,
        "pytorch_model.bin": pickle,
    }
    named = config(auto_map={"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"})
    attempt(build(tmp_path / "beside", named | evil))
    refused(
        tmp_path / "instead",
        without(named, SINGLE) | evil,
        "only as pytorch_model.bin, a pickle",
    )
    assert not mark.exists()


def test_a_header_of_many_tensors(tmp_path):
    """A hundred thousand tensors that nobody needs, in a header of 10 MB, are no reason to hang."""
    tables = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": {
            "dtype": "F32",
            "shape": [0],
            "data_offsets": [0, 0],
        }
        for i in range(100_000)
    }
    refused(tmp_path, WHOLE | {SINGLE: safetensors(tables)}, "lack the weights of")


def test_an_index_of_many_shards(tmp_path):
    places = {f"tensor {i}": f"model-{i}.safetensors" for i in range(100_000)}
    refused(
        tmp_path,
        SHARDED | {INDEX: json.dumps({"weight_map": places}).encode()},
        "has no file",
    )


@pytest.mark.parametrize("filler", [b"{},", b"[],", b"1,", b'"",'], ids=str)
def test_a_config_of_many_megabytes(tmp_path, filler):
    """Small values take twenty times their text in memory: refused by size, before it is parsed."""
    text = b'{"a": [' + filler * (34_000_000 // len(filler)) + b"0]}"
    refused(tmp_path, WHOLE | {"config.json": text}, "too many for a JSON file|more lists and objects")


def test_a_safetensors_header_of_many_megabytes(tmp_path):
    refused(
        tmp_path,
        WHOLE | {SINGLE: safetensors(b" " * 26_000_000 + b"{}", b" " * 8)},
        "has a header of 26000002",
    )


def test_the_command_line_says_it_in_one_sentence(tmp_path):
    build(tmp_path, WHOLE | {SINGLE: WHOLE[SINGLE][:-1]})
    arguments = [sys.executable, "-m", "streamllm", "generate", "hello", "--model", str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"Error: .* is not a whole safetensors file .*; download it again\n", done.stderr)
