"""The files of sessions are safetensors files, whoever wrote them, and what is damaged is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from streamllm.session.tensor_file import TensorFile, write_tensors

TENSORS = {
    "keys": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4),
    "half": torch.arange(5, dtype=torch.bfloat16),
    "rounded": torch.arange(7, dtype=torch.int8),
    "counts": torch.tensor([1, 2], dtype=torch.int64),
    "number": torch.tensor(3, dtype=torch.int64),
    "none": torch.zeros(0, 4, dtype=torch.float64),
}
METADATA = {"format": "a session", "state": "ü\n"}


def write(path: Path) -> None:
    with path.open("wb") as file:
        write_tensors(file, METADATA, TENSORS)


def test_the_library_reads_what_is_written(tmp_path):
    write(tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == METADATA
        assert set(file.keys()) == set(TENSORS)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("by_library", [True, False])
def test_what_was_written_is_read(tmp_path, by_library):
    if by_library:
        save_file(TENSORS, tmp_path / "file", METADATA)
    else:
        write(tmp_path / "file")
    file = TensorFile(tmp_path / "file")
    assert file.metadata == METADATA
    found = file.tensors()
    del file
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [3, 3, 4]}, {"shape": [-2, -3, 4]}, {"shape": 24}, {"shape": [2.0, 3, 4]}, {"dtype": "F8"},
        {"data_offsets": [0, 95]}, {"data_offsets": [10**30, 10**30 + 96]}, {"data_offsets": [-96, 0]},
        {"data_offsets": [0]}, {"data_offsets": None},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_headers_are_refused(tmp_path, change):
    path = tmp_path / "file"
    write(path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["keys"].update(change)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises((ValueError, KeyError, TypeError)):
        TensorFile(path).tensors()


@pytest.mark.parametrize(
    "data", [b"", b"1234567", b"\xff" * 20, (2).to_bytes(8, "little") + b"{}", b"\0" * 8]
)
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=r".+"):
        TensorFile(tmp_path / "file")


PROGRAM = """
import sys, streamllm
model, tokenizer = streamllm.load(device="cpu")
stream = streamllm.Stream(model, tokenizer, window=30)
stream.feed("def ")
before = set(sys.modules)
stream.save(sys.argv[1])
streamllm.Stream.load(sys.argv[1], model, tokenizer)
print(len(set(sys.modules) - before))
"""


def test_saving_imports_no_large_module(tmp_path):
    """A helper of torch imports sympy: 489 modules, and 37 MB of each process that saves once."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "session")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 20
