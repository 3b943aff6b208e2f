"""One process of a tensor-parallel job on CUDA: compares its results with those of the whole model.

torchrun --nproc-per-node N -m tests.laws.tensor_parallel_cuda_job FOLDER

Where the machine has fewer GPUs than processes, they share the first one, and meet through gloo instead of NCCL.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

import streamllm
from streamllm.tensor_parallel import join
from tests.laws.scenarios import TOLERANCE, error
from tests.laws.tensor_parallel_job import results


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    device = "cuda"
    shared = int(os.environ["WORLD_SIZE"]) > torch.cuda.device_count()
    if shared:
        device = "cuda:0"
        dist.init_process_group("gloo")
    job = join(device)
    for quantize in (None, "int8"):
        options = {"dtype": "float64", "quantize": quantize}
        part = streamllm.load_model(folder, tensor_parallel=True, device=device, **options)
        whole = streamllm.load_model(folder, device=job.device, **options)
        models = [part]
        if quantize is None:
            models.append(streamllm.compile(part, "flat"))
            if not shared:  # gloo cannot be captured
                models.append(streamllm.compile(part, "cudagraphs"))
        with torch.inference_mode():
            wanted = results(whole)
            for model in models:
                got = results(model)
                for what in ("dense", "streamed", "ragged"):
                    assert error(got[what], wanted[what]) <= TOLERANCE, (what, model)
                assert got["sampled"] == wanted["sampled"]
    print(f"process {job.rank} of {job.ranks}: equal", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
