"""One model in several processes, each of which holds some of its heads, MLP units and tokens.

model = streamllm.load_model(name, tensor_parallel=True)    # in each process that torchrun has started
"""

from streamllm.tensor_parallel.collectives import JobError
from streamllm.tensor_parallel.plan import Share, allowed_ranks, list_numbers
from streamllm.tensor_parallel.processes import (
    Job,
    PeerFailed,
    agreed_seed,
    is_reported_elsewhere,
    is_tensor_parallel,
    join,
)

__all__ = [
    "Job",
    "JobError",
    "PeerFailed",
    "Share",
    "agreed_seed",
    "allowed_ranks",
    "is_reported_elsewhere",
    "is_tensor_parallel",
    "join",
    "list_numbers",
]
