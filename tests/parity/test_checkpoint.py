"""What `streamllm parity` checks, as tests of the checkpoint given by --checkpoint."""

from __future__ import annotations

import pytest

from streamllm.parity import DTYPES, compare, compare_streaming


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_those_of_transformers(checkpoint: str, dtype: str) -> None:
    report = compare(checkpoint, dtype=dtype)
    assert report.passed, f"\n{report}"


def test_a_stream_past_eviction_is_as_defined(checkpoint: str) -> None:
    report = compare_streaming(checkpoint)
    assert report.passed, f"\n{report}"
