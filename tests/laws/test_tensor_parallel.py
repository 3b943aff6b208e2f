"""The law of tensor parallelism: the processes of a job give the logits of one process, in float64.

torchrun starts the processes, which run tests/laws/tensor_parallel_job.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import streamllm
from tests import tiny
from tests.checkpoints import make
from tests.laws.scenarios import TOLERANCE, error
from tests.laws.tensor_parallel_job import MUTATIONS, load, results
from tests.parity.grid import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
MARGIN = 1e-6  # standard deviations of the logits; what a fault must change at least
CASES = (
    "llama-gqa", "llama-mqa", "llama-tied", "llama-biased", "llama-code", "mistral-v0.1", "qwen2-0.5b", "qwen3-8b",
    "gpt_neox-20b", "gpt_neox-sequential", "gpt_neox-odd-rotary", "falcon-7b", "falcon-separate-heads", "falcon-40b",
    "falcon-40b-biased", "falcon-40b-alibi", "falcon-rw-1b", "falcon-rw-5-heads", "mpt-7b", "mpt-clipped",
    "mpt-5-heads", "mpt-untied",
)  # fmt: skip
LARGE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4000,
}
LARGE_SHARDS = 8
LIMIT_BYTES = 70_000_000  # that each process may map beyond what it needs to run; the model has 108 million


def torchrun(processes: int, module: str, *arguments: str) -> str:
    """Runs a module in so many processes; returns what they printed."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "-m", module, *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensor-parallel")
    for variant in VARIANTS:
        if variant.name in (*CASES, "mpt-one-head"):
            layers = "n_layers" if variant.name.startswith("mpt") else "num_hidden_layers"
            variant = replace(variant, config={**variant.config, layers: 2})
            path = folder / "one-head" if variant.name == "mpt-one-head" else folder / "cases" / variant.name
            path.mkdir(parents=True)
            make(path, variant)
    grouped = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
               "head_dim": 16, "vocab_size": 200}  # fmt: skip
    tiny.write(folder / "grouped", tiny.checkpoint({**grouped, "intermediate_size": 256}))
    tiny.write(folder / "not grouped", tiny.checkpoint({**grouped, "intermediate_size": 96}))
    tiny.write(folder / "large", tiny.checkpoint(LARGE, shards=LARGE_SHARDS))
    return folder


@pytest.fixture(scope="module", params=[2, 4], ids=["2 processes", "4 processes"])
def job(folder: Path, request: pytest.FixtureRequest) -> tuple[int, dict]:
    """How many processes ran, and their results."""
    torchrun(request.param, "tests.laws.tensor_parallel_job", str(folder), str(LIMIT_BYTES))
    return request.param, torch.load(folder / f"results-{request.param}.pt")


@pytest.fixture(scope="module")
def alone(folder: Path):
    """alone(name, **options): the results of one process, computed once."""
    known = {}

    def of_one_process(name, **options):
        key = name, *options.items()
        if key not in known:
            with torch.inference_mode():
                known[key] = results(load(folder / "cases" / name, False, **options))
        return known[key]

    return of_one_process


def assert_equal(got, wanted):
    for what in ("dense", "streamed", "ragged"):
        assert error(got[what], wanted[what]) <= TOLERANCE, what
    assert got["sampled"] == wanted["sampled"]
    assert got["batch"] == wanted["batch"]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_sampled_text_are_those_of_one_process(name, job, alone):
    assert_equal(job[1][name], alone(name))


@pytest.mark.parametrize("name", CASES)
def test_a_cache_holds_the_heads_of_its_process(name, job, folder):
    ranks, found = job
    model = load(folder / "cases" / name, False)
    whole, heads = model.geometry.kv_heads, found[name]["kv_heads"]
    assert sum(heads) == max(whole, ranks)
    assert max(heads) - min(heads) <= 1
    nbytes = streamllm.SinkCache(model, 2, 6).nbytes
    assert found[name]["bytes"] == [nbytes * held // whole for held in heads]


def test_int8_weights_are_rounded_as_in_one_process(job, alone):
    assert_equal(job[1]["int8"], alone("llama-gqa", quantize="int8"))


def test_int4_weights_are_rounded_as_in_one_process(job, folder):
    with torch.inference_mode():
        assert_equal(job[1]["int4"], results(load(folder / "grouped", False, quantize="int4")))


def test_int4_groups_that_several_processes_would_hold_are_refused(job):
    assert "at the borders of groups: start fewer" in job[1]["groups of several processes"]


def test_the_flat_backend_records_the_sums(job, alone):
    assert job[1]["flat"]["recordings"] > 0
    assert_equal(job[1]["flat"], alone("llama-gqa"))


def test_processes_agree_on_a_seed(job):
    ranks, found = job
    assert found["without a seed"] == [found["without a seed"][0]] * ranks


def test_other_tokens_in_another_process_are_refused(job):
    assert "same tokens" in job[1]["other tokens"]


def test_heads_that_cannot_be_divided_are_refused_by_all(job):
    ranks, found = job
    assert len(found["one head"]) == ranks
    assert all("start 1 of them" in sentence for sentence in found["one head"])


@pytest.mark.parametrize("mutation", [mutation.__name__ for mutation in MUTATIONS])
@pytest.mark.parametrize("job", [2], indirect=True, ids=["2 processes"])
def test_a_mutation_changes_the_logits(mutation, job, alone):
    name = next(name for fault, name in MUTATIONS.items() if fault.__name__ == mutation)
    assert error(job[1][mutation], alone(name)["dense"]) > MARGIN


@pytest.mark.parametrize("job", [4], indirect=True, ids=["4 processes"])
def test_a_model_larger_than_the_memory_of_a_process_runs_on_four(job, folder):
    limit, model = job[1]["limit"], streamllm.load_model(folder / "large", device="cpu")
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 1.5 * LIMIT_BYTES
    assert "loaded" not in limit["alone"], "the limit has no effect"
    assert all(held < 0.26 * size for held in limit["held"])
    assert sum(limit["held"]) < 1.01 * size
    with torch.inference_mode():
        wanted = model(torch.arange(12)[None])
    assert error(limit["logits"], wanted) < 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("processes", [1, 2])
def test_processes_on_cuda_give_the_results_of_one(processes, tmp_path):
    tiny.write(tmp_path, tiny.checkpoint())
    printed = torchrun(processes, "tests.laws.tensor_parallel_cuda_job", str(tmp_path))
    assert printed.count(": equal") == processes
