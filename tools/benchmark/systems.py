"""The table of systems, which tasks each supports, and how many tokens a round has."""

from __future__ import annotations

from collections.abc import Callable

from benchmark.limit import limit
from benchmark.ours import BACKEND_OF, ours
from benchmark.peer_llama_cpp import llama_cpp
from benchmark.peer_streaming_llm import streaming_llm
from benchmark.peer_transformers import transformers
from benchmark.spec import SINKS, Round, Spec

SYSTEMS: dict[str, Callable[[Spec], Round]] = {
    "limit": limit,
    **dict.fromkeys(BACKEND_OF, ours),
    "dynamic": lambda spec: transformers(spec, "dynamic"),
    "static": lambda spec: transformers(spec, "static"),
    "static-compiled": lambda spec: transformers(spec, "static-compiled"),
    "sliding": lambda spec: transformers(spec, "sliding"),
    "streaming-llm": lambda spec: streaming_llm(spec, "streaming-llm"),
    "attention-sinks": lambda spec: streaming_llm(spec, "attention-sinks"),
    "llama-cpp": llama_cpp,
}
PEERS = ("streaming-llm", "attention-sinks", "llama-cpp")  # run in environments of their own
TOKEN_LOOPS = ("streaming-llm", "attention-sinks")  # score by single tokens


def is_supported(spec: Spec) -> bool:
    """Whether the system has the task and the dtype."""
    if spec.system in ("limit", "llama-cpp", "static-compiled"):
        return spec.task == "decode" and (not spec.quantize or spec.system != "static-compiled")
    if spec.system in ("dynamic", "static", "sliding", *TOKEN_LOOPS):
        if spec.quantize:
            return False
        return spec.task == "decode" or (spec.task == "score") == (spec.system in TOKEN_LOOPS)
    return spec.task == "decode" or spec.system == "ours"


def tokens_per_round(spec: Spec) -> int:
    if spec.task == "decode" or spec.system in TOKEN_LOOPS:
        # More tokens for small models: in the first milliseconds of a round a second core only wakes up.
        return max(20, min(200, spec.window // 5)) if spec.model in ("tiny", "S") else 20
    return 2 * (SINKS + spec.window)
