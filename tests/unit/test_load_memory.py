"""Loading holds the result, and beside it one tensor and the pages of a few others."""

import pytest

from tools import load_memory


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_peak_is_the_larger_of_file_and_result(tmp_path, monkeypatch, dtype):
    monkeypatch.setitem(load_memory.CONFIG, "vocab_size", 2000)  # so that no tensor has more than 23 MB
    size = load_memory.make(tmp_path, 250_000_000)
    peak, _, result, _ = load_memory.measure(tmp_path, "streamllm", dtype)
    assert result > 0.99 * size
    assert peak < max(size, result) + 130_000_000
