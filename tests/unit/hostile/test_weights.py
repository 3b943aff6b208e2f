"""Damaged safetensors files, tensors that do not fit the model, and damaged indexes."""

import json
import struct
from typing import Any

import pytest
import torch

from tests.tiny import INDEX, SINGLE
from tests.unit.hostile.samples import (
    BRACKETS,
    DEEP,
    EMBED,
    HEAD,
    INTACT,
    NAN,
    NORM,
    NORM1,
    NOT_INTACT,
    SHARDED,
    SHARDS,
    TENSORS,
    check_refused,
    entry,
    safetensors,
    with_header,
    with_index,
    with_tensors,
)

DAMAGED = {
    "empty": b"",
    "seven bytes": b"1234567",
    "no header": struct.pack("<Q", 0),
    "header longer than the file": safetensors({}, length=10**6),
    "header of 2^63 bytes": safetensors({}, length=2**63),
    "header of 2^64-1 bytes": safetensors({}, length=2**64 - 1),
    "header is not JSON": safetensors(b"{nothing"),
    "header is a list": safetensors([1, 2, 3]),
    "header is not UTF-8": safetensors(b'{"\xff\xfe":1}'),
    "header nested deeply": safetensors(DEEP),
    "header of brackets": safetensors(BRACKETS),
    "data without tensors": safetensors({}, b"12345678"),
    "one byte short": INTACT[SINGLE][:-1],
    "half of the file": INTACT[SINGLE][: len(INTACT[SINGLE]) // 2],
    "one byte more": INTACT[SINGLE] + b"\0",
    "overlapping tensors": with_header(data_offsets=[0, 64]),
    "offsets beyond the file": with_header(data_offsets=[10**9, 10**9 + 64]),
    "offsets of 2^63": with_header(data_offsets=[2**63, 2**63 + 64]),
    "offsets backwards": with_header(data_offsets=[64, 0]),
    "offsets below zero": with_header(data_offsets=[-64, 0]),
    "offsets are not whole numbers": with_header(data_offsets=[0.5, 64.5]),
    "three offsets": with_header(data_offsets=[0, 64, 128]),
    "no offsets": with_header(data_offsets=None),
    "shape larger than its data": with_header(shape=[17]),
    "shape of 2^66": with_header(shape=[2**33, 2**33]),
    "shape below zero": with_header(shape=[-16]),
    "shape is text": with_header(shape="16"),
    "no such dtype": with_header(dtype="F31"),
    "a very long dtype": with_header(dtype="F31\n" * 1000),
    "wider dtype": with_header(dtype="F64"),
    "metadata is not text": safetensors({"__metadata__": {"a": [1]}}),
    "a name twice": safetensors(b'{"a":%b,"a":%b}' % (entry(0), entry(4)), b"12345678"),
    "a web page": b"<!doctype html><title>504 Gateway Time-out</title>" * 10,
}

# Changes of the tensors (None removes one), and the error.
TENSOR_CASES = {
    "a missing tensor": ({NORM: None}, "lack the weights of norm.weight"),
    "a missing layer": ({name: None for name in TENSORS if ".1." in name}, "lack the weights of layers.1"),
    "a missing head": ({HEAD: None}, "lack the weights of head.weight"),
    "no tensor of the model": (
        dict.fromkeys(TENSORS) | {"x": NAN},
        "2 layers, but the files hold only 1 tensors",
    ),
    "an unknown tensor": ({"model.surprise": NAN}, "no place for model.surprise"),
    "one layer too many": ({"model.layers.2." + NORM1: NAN}, "no place for model.layers.2"),
    "layer 999999999": ({"model.layers.999999999." + NORM1: NAN}, "no place for model.layers.9"),
    "layer 01": ({"model.layers.01." + NORM1: NAN}, "no place for model.layers.01"),
    "layer -1": ({"model.layers.-1." + NORM1: NAN}, "no place for model.layers.-1"),
    "an evil name": ({"../\n\x1b[2J" + "x" * 5000: NAN}, "no place for"),
    "another prefix": ({"transformer." + name: NAN for name in TENSORS}, "no place for"),
    "one parameter under two names": ({"norm.weight": NAN}, "twice, under two names"),
    "a wrong shape": ({NORM: torch.ones(17)}, r"norm.weight has the shape \[17\], .* must have \[16\]"),
    "transposed": ({EMBED: torch.ones(16, 258)}, r"shape \[16, 258\], .* must have \[258, 16\]"),
    "a scalar": ({NORM: torch.tensor(1.0)}, r"has the shape \[\]"),
    "an empty tensor": ({NORM: torch.ones(0)}, r"has the shape \[0\]"),
    "61 dimensions": ({NORM: torch.ones([16] + [1] * 60)}, r"has the shape \[16, 1, 1"),
    "integers": ({NORM: torch.ones(16, dtype=torch.int64)}, "stored as I64; supported: F64"),
    "8-bit floats": ({NORM: torch.ones(16).to(torch.float8_e4m3fn)}, "stored as F8_E4M3; supported: F64"),
}


# Changes of the index's map, or its whole text, and the error.
INDEXES: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    "not JSON": (b"{", "is not valid JSON"),
    "a list": (b"[]", "must hold a JSON object"),
    "nested deeply": (DEEP, "nested too deeply"),
    "of brackets": (BRACKETS, "more than 100,000 lists and objects"),
    "without a map": (b"{}", "has no weight_map"),
    "with an empty map": (b'{"weight_map": {}}', "has no weight_map"),
    "map is a list": (b'{"weight_map": ["a"]}', "has no weight_map"),
    "shard is a number": ({NORM: 7}, "must map names of tensors to names of files"),
    "shard is a list": ({NORM: [SHARDS[0]]}, "must map names of tensors to names of files"),
    "shard does not exist": ({NORM: "gone.safetensors"}, "has no file 'gone.safetensors'"),
    "shard is the config": ({NORM: "config.json"}, NOT_INTACT),
    "shard is the index": ({NORM: INDEX}, NOT_INTACT),
    "shard is empty text": ({NORM: ""}, "file name '' is empty"),
    "shard in the parent folder": ({NORM: "../model.safetensors"}, "leaves its folder with '..'"),
    "shard by way of the parent folder": ({NORM: "x/../../x.safetensors"}, "leaves its folder with '..'"),
    "shard in the root folder": ({NORM: "/etc/passwd"}, "is an absolute path"),
    "shard on a drive": ({NORM: "C:\\x.safetensors"}, "backslash or a drive"),
    "shard with a NUL": ({NORM: "x\0.safetensors"}, "control characters"),
    "shard with half of a surrogate pair": ({NORM: "\ud800.safetensors"}, "control characters"),
    "shard with a long name": ({NORM: "x" * 10_000}, "is too long"),
    "a tensor that no shard has": (
        {"surprise": SHARDS[0]},
        "the index lists surprise, but no shard has them",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_safetensors(tmp_path, case):
    check_refused(tmp_path, INTACT | {SINGLE: DAMAGED[case]}, NOT_INTACT)


@pytest.mark.parametrize("case", TENSOR_CASES)
def test_tensors_that_do_not_fit(tmp_path, case):
    check_refused(tmp_path, with_tensors(TENSOR_CASES[case][0]), TENSOR_CASES[case][1])


@pytest.mark.parametrize("case", INDEXES)
def test_damaged_indexes(tmp_path, case):
    change, pattern = INDEXES[case]
    check_refused(
        tmp_path, SHARDED | {INDEX: change} if isinstance(change, bytes) else with_index(change), pattern
    )


def test_header_with_many_tensors(tmp_path):
    """A header of 10 MB with 100,000 tensors that are not needed does not take long."""
    tables = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": {
            "dtype": "F32",
            "shape": [0],
            "data_offsets": [0, 0],
        }
        for i in range(100_000)
    }
    check_refused(tmp_path, INTACT | {SINGLE: safetensors(tables)}, "lack the weights of")


def test_index_with_many_shards(tmp_path):
    places = {f"tensor {i}": f"model-{i}.safetensors" for i in range(100_000)}
    check_refused(
        tmp_path,
        SHARDED | {INDEX: json.dumps({"weight_map": places}).encode()},
        "has no file",
    )


def test_header_that_is_too_large(tmp_path):
    check_refused(
        tmp_path,
        INTACT | {SINGLE: safetensors(b" " * 26_000_000 + b"{}", b" " * 8)},
        "has a header of 26,000,002 bytes",
    )
