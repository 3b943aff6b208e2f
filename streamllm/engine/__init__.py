"""Many streams, computed together: one forward takes a token of each.

Every stream has a cache of constant size, so serving many needs no paging and no eviction policy: it needs slots.

slots.py     the memory of all streams, and the forward of one token each
row.py       what a batch needs to know of one stream
batch.py     one step: prompts are read in chunks, running streams get a token each
request.py   the text of one stream on its way to its reader, a thread or asyncio
engine.py    Engine: a thread that steps a batch, and takes requests
tracebacks.py  errors that are kept do not keep the streams of their step
offline.py   lists of prompts, without a thread: generate_batch, complete
"""

from streamllm.engine.engine import Engine
from streamllm.engine.offline import Completion, complete, completions, generate_batch
from streamllm.engine.request import Request

__all__ = ["Completion", "Engine", "Request", "complete", "completions", "generate_batch"]
