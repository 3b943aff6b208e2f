"""One process of a tensor-parallel job: computes the cases of a folder, and the first process writes the results.

torchrun --nproc-per-node N -m tests.laws.tensor_parallel_job FOLDER
"""

from __future__ import annotations

import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamllm
from streamllm.models import alibi
from streamllm.models.alibi import Alibi
from streamllm.tensor_parallel import Job, Share, join, layers, processes
from streamllm.weights.checkpoint import checkpoint

SINKS, WINDOW = 2, 6
TOKENS = torch.randint(0, 150, (2, 24), generator=torch.Generator().manual_seed(0))
PARTS = [14, 1, 1, 8]  # the window is full after 8 tokens


def results(model: nn.Module) -> dict[str, Any]:
    """What is compared: logits, dense and streaming past eviction, and the text that is sampled."""
    tokens = TOKENS.to(next(model.parameters()).device)
    cache = streamllm.SinkCache(model, SINKS, WINDOW, 2, chunk=8)
    streamed = [model(part, cache) for part in tokens.split(PARTS, 1)]
    ragged = model(tokens[:, :3], cache, lengths=[1, 3])
    cache = streamllm.SinkCache(model, SINKS, WINDOW)
    sampled = streamllm.generate(
        model, tokens[0], cache, max_new_tokens=4, temperature=1.0, top_p=0.9, seed=1
    )
    prompts = [tokens[0, :9], tokens[1, :3], tokens[1]]
    batch = streamllm.generate_batch(
        model, prompts, slots=2, sinks=SINKS, window=WINDOW, max_new_tokens=4, temperature=1.0, seed=1
    )
    return {
        "batch": list(batch),
        "dense": model(tokens),
        "streamed": torch.cat(streamed, 1),
        "ragged": torch.stack((ragged[0, 0], ragged[1, 2])),
        "sampled": list(sampled),
    }


def load(folder: Path, tensor_parallel: bool, **options: Any) -> nn.Module:
    return streamllm.load_model(
        folder, tensor_parallel=tensor_parallel, dtype="float64", device="cpu", **options
    )


# Faults on purpose: each must change the logits.


def no_sum_of_products(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layers.SummedLinear, "forward", nn.Linear.forward)


def bias_in_every_process(patch: pytest.MonkeyPatch) -> None:
    def forward(self: layers.SummedLinear, x: Tensor) -> Tensor:
        return layers.sum_(self.kernel(x, self.weight, self.bias))

    patch.setattr(layers.SummedLinear, "forward", forward)


def slopes_of_the_first_heads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layers.AlibiOfHeads, "slopes", lambda self: Alibi.slopes(self)[: len(self.held)])


def slopes_of_a_smaller_model(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layers.AlibiOfHeads, "slopes", lambda self: Alibi(len(self.held)).slopes())


def key_heads_of_the_first_process(patch: pytest.MonkeyPatch) -> None:
    indices = Share._indices.func

    def wrong(self: Share) -> dict[str, range]:
        first = indices(Share(self.config, 0, self.ranks))
        return {**indices(self), "key/value heads": first["key/value heads"]}

    patch.setattr(Share, "_indices", property(wrong))


def fused_rows_cut_as_if_they_were_not_fused(patch: pytest.MonkeyPatch) -> None:
    cut = checkpoint.cut

    def wrong(whole: Tensor, split: Any, config: Any, slices: Any) -> list[Tensor]:
        if split is None:
            return cut(whole, split, config, slices)
        sizes = [len(rows) for rows in split(torch.arange(len(whole)), config)]
        return [part.of(rows) for part, rows in zip(slices, whole.split(sizes), strict=True)]

    patch.setattr(checkpoint, "cut", wrong)


def embedding_of_one_process(patch: pytest.MonkeyPatch) -> None:
    forward = layers.SplitEmbedding.forward

    def wrong(self: layers.SplitEmbedding, tokens: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(layers, "sum_", lambda x: x)
            return forward(self, tokens)

    patch.setattr(layers.SplitEmbedding, "forward", wrong)


def vocabulary_in_reverse(patch: pytest.MonkeyPatch) -> None:
    gather = layers.gather
    patch.setattr(layers, "gather", lambda x, ranks: gather(x, ranks)[::-1])


# The fault, and the checkpoint that shows it.
MUTATIONS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    no_sum_of_products: "llama-gqa",
    bias_in_every_process: "llama-biased",
    slopes_of_the_first_heads: "falcon-rw-1b",
    slopes_of_a_smaller_model: "mpt-7b",
    key_heads_of_the_first_process: "llama-gqa",
    fused_rows_cut_as_if_they_were_not_fused: "gpt_neox-20b",
    embedding_of_one_process: "llama-tied",
    vocabulary_in_reverse: "llama-gqa",
}


@contextmanager
def memory_limit(added_bytes: int) -> Iterator[None]:
    """Within the context, this process may map only so many bytes more than it has mapped."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + added_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def load_within_a_limit(folder: Path, added_bytes: int, job: Job) -> dict[str, Any]:
    """Whether the model loads in one process and in all, if each may map only `added_bytes` more."""
    alone = "loaded"
    with memory_limit(added_bytes):
        if job.is_first:
            try:
                streamllm.load_model(folder, device="cpu")
            except (RuntimeError, MemoryError, OSError) as error:
                alone = f"{type(error).__name__}: {error}"
        model = streamllm.load_model(folder, device="cpu", tensor_parallel=True)
        held = sum(parameter.nbytes for parameter in model.parameters())
        logits = model(torch.arange(12)[None])
    return {"alone": alone, "held": processes.exchange(held), "logits": logits}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    job = join("cpu")
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for path in sorted((folder / "cases").iterdir()):
            model = load(path, True)
            found[path.name] = {
                **results(model),
                "kv_heads": processes.exchange(model.geometry.kv_heads),
                "bytes": processes.exchange(streamllm.SinkCache(model, SINKS, WINDOW).nbytes),
            }
            texts = processes.exchange(found[path.name]["sampled"])
            assert all(text == texts[0] for text in texts), texts
        path = folder / "cases" / "llama-gqa"
        found["int8"] = results(load(path, True, quantize="int8"))
        found["int4"] = results(load(folder / "grouped", True, quantize="int4"))
        try:
            load(folder / "not grouped", True, quantize="int4")
        except ValueError as error:
            found["groups of several processes"] = str(error)
        model = streamllm.compile(load(path, True), "flat")
        found["flat"] = {**results(model), "recordings": model.recordings}
        tokens = [job.rank, 5]
        try:
            streamllm.generate(model, tokens)
        except ValueError as error:
            found["other tokens"] = str(error)
        tokens = list(streamllm.generate(model, [5], max_new_tokens=8, temperature=2.0))
        found["without a seed"] = processes.exchange(tokens)
        try:
            load(folder / "one-head", True)
        except ValueError as error:
            found["one head"] = processes.exchange(str(error))
        if job.ranks == 2:
            for mutation, name in MUTATIONS.items():
                with pytest.MonkeyPatch.context() as patch:
                    mutation(patch)
                    alibi._slopes.cache_clear()
                    found[mutation.__name__] = load(folder / "cases" / name, True)(TOKENS)
        else:
            found["limit"] = load_within_a_limit(folder / "large", int(sys.argv[2]), job)
    if job.is_first:
        torch.save(found, folder / f"results-{job.ranks}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
