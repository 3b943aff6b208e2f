"""The checks of `streamllm parity` as tests, for the checkpoint that --checkpoint names."""

from __future__ import annotations

import pytest

from streamllm.parity import DTYPES, compare, compare_streaming


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_equal_those_of_transformers(checkpoint: str, dtype: str) -> None:
    report = compare(checkpoint, dtype=dtype)
    assert report.passed, f"\n{report}"


def test_stream_past_eviction_equals_the_definition(checkpoint: str) -> None:
    report = compare_streaming(checkpoint)
    assert report.passed, f"\n{report}"
