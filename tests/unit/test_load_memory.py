"""What stays as it is on disk is mapped: loading it takes no memory of its own, not even for a moment."""

from tools import load_memory


def test_a_mapped_load_copies_nothing(tmp_path):
    size = load_memory.make(tmp_path, 300_000_000)  # of which the embedding has 131
    peak, anonymous, result, _ = load_memory.measure(tmp_path, "streamllm", "bfloat16")
    assert result > 0.99 * size
    assert anonymous < 30_000_000
    assert peak < 1.1 * size
