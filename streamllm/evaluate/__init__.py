"""Evidence: how well a model streams, where its attention goes, and what it remembers."""

from streamllm.evaluate.inspect import Attention, Recommendation, attention, recommend
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

__all__ = [
    "MODES",
    "Attention",
    "Bucket",
    "Comparison",
    "Recommendation",
    "Result",
    "attention",
    "compare",
    "load",
    "perplexity",
    "recommend",
    "save",
]
