"""One model in several processes, each of which holds some of its heads, MLP units and tokens.

model = streamllm.load_model(name, tensor_parallel=True)    # in each process that torchrun has started
"""

from streamllm.tensor_parallel.collectives import ProcessLost
from streamllm.tensor_parallel.plan import Share, allowed_ranks
from streamllm.tensor_parallel.processes import (
    Job,
    PeerFailed,
    agreed_seed,
    all_or_none,
    from_first,
    is_reported_elsewhere,
    is_tensor_parallel,
    join,
)

__all__ = [
    "Job",
    "PeerFailed",
    "ProcessLost",
    "Share",
    "agreed_seed",
    "all_or_none",
    "allowed_ranks",
    "from_first",
    "is_reported_elsewhere",
    "is_tensor_parallel",
    "join",
]
