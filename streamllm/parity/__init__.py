"""Parity: does this library compute a checkpoint as transformers does, and stream it as the definition says?

    streamllm parity NAME_OR_FOLDER

Run it before you trust this library with your own checkpoint. It is the only part that needs transformers:
pip install 'streamllm[parity]'.

    compare             logits and layer outputs against transformers, without eviction
    compare_streaming   a stream past eviction against its definition, in float64
"""

from streamllm.parity.logits import DTYPES, compare
from streamllm.parity.report import Difference, Report, Row
from streamllm.parity.streaming import compare_streaming

__all__ = ["DTYPES", "Difference", "Report", "Row", "compare", "compare_streaming"]
