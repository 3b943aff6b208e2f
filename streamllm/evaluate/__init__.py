"""How well a model streams, where its attention goes, and which facts it recalls."""

from streamllm.evaluate.comparison import Comparison, compare
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
from streamllm.evaluate.result import Bucket, Result
from streamllm.evaluate.ruler import TASKS, ruler, ruler_script
from streamllm.evaluate.saving import load, save
from streamllm.evaluate.scoring import MODES, perplexity

__all__ = [
    "MODES",
    "TASKS",
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
    "ruler",
    "ruler_script",
    "save",
    "stream_eval",
    "stream_eval_script",
]
