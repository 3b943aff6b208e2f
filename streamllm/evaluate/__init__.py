"""Scores of a long text under the four ways of attending to it."""

from streamllm.evaluate.scoring import (
    MODES,
    Bucket,
    Comparison,
    Result,
    compare,
    load,
    perplexity,
    save,
)

__all__ = ["MODES", "Bucket", "Comparison", "Result", "compare", "load", "perplexity", "save"]
