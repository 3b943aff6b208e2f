"""Evidence: how well a model streams, where its attention goes, and what it remembers."""

from streamllm.evaluate.inspect import Attention, Recommendation, attention, recommend
from streamllm.evaluate.recall import (
    WORDINGS,
    Recall,
    Script,
    Wording,
    passkey,
    passkey_script,
    stream_eval,
    stream_eval_script,
)
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
    "WORDINGS",
    "Attention",
    "Bucket",
    "Comparison",
    "Recall",
    "Recommendation",
    "Result",
    "Script",
    "Wording",
    "attention",
    "compare",
    "load",
    "passkey",
    "passkey_script",
    "perplexity",
    "recommend",
    "save",
    "stream_eval",
    "stream_eval_script",
]
