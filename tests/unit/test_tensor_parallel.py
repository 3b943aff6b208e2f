"""Tensor parallelism: what each process holds, and how a job of processes prints, fails and ends.

The logits are compared in tests/laws/test_tensor_parallel.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from click.testing import CliRunner

import streamllm
from streamllm.cli import cli
from streamllm.engine.batch import Batch
from streamllm.models import falcon
from streamllm.models.alibi import Alibi
from streamllm.models.rotary import Rope
from streamllm.tensor_parallel import JobError, Share, allowed_ranks, join, list_numbers
from streamllm.tensor_parallel.collectives import reporting_lost_processes
from streamllm.tensor_parallel.plan import PLAN, _planned
from streamllm.tensor_parallel.processes import _own_device
from streamllm.weights import falcon as falcon_files
from streamllm.weights import gpt_neox as neox_files
from streamllm.weights import mpt as mpt_files
from streamllm.weights.checkpoint.part import cut
from tests.laws.families import CONFIGS, FALCON, MODELS, MPT, NEOX

END_SECONDS = 30  # in which a job must end after one of its processes died; alone, it takes 1 to 3


def meta_model(config):
    with torch.device("meta"):
        return MODELS[type(config)].Model(config)


def shares(config, ranks):
    return [Share(config, rank, ranks) for rank in range(ranks)]


# The plan


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_slices_of_all_processes_make_each_parameter(name, ranks):
    config = CONFIGS[name]
    parts = shares(config, ranks)
    models = [part.build(lambda own: meta_model(own), config) for part in parts]
    own = [dict(model.named_parameters()) for model in models]
    for parameter, whole in meta_model(config).named_parameters():
        slices = [part.slice(parameter) for part in parts]
        for held, piece in zip(own, slices, strict=True):
            wanted = whole if piece is None else piece.of(whole)
            assert held[parameter].shape == wanted.shape, parameter
        if slices[0] is not None:
            dim = slices[0].dim
            indices = [index for piece in slices for index in piece.indices]
            assert set(indices) == set(range(whole.shape[dim])), parameter
            shared = ".attention.k." in parameter or ".attention.v." in parameter
            assert len(indices) == len(set(indices)) or (shared and ranks > parts[0].config.heads // 4)
    assert all(model.geometry.vocab_size == config.vocab_size for model in models)


def test_every_module_with_parameters_is_in_the_plan():
    used = set()
    for config in CONFIGS.values():
        for parameter, _ in meta_model(config).named_parameters():
            path = parameter.rpartition(".")[0]
            _planned(path)
            used.add(".".join("{}" if part.isdigit() else part for part in path.split(".")))
    assert used == set(PLAN)


def test_falcon_7b_is_divided_among_four_processes():
    config = replace(FALCON, width=71 * 64, mlp_width=4 * 71 * 64, heads=71, kv_heads=1, head_dim=64)
    parts = shares(config, 4)
    assert [len(part.heads) for part in parts] == [17, 18, 18, 18]
    assert [part.heads.start for part in parts] == [0, 17, 35, 53]
    assert all(part.kv_heads == range(1) for part in parts)


def test_query_heads_stay_with_the_key_head_that_they_read():
    config = replace(FALCON, heads=24, kv_heads=3)
    for ranks in allowed_ranks(config):
        for part in shares(config, ranks):
            assert {head // 8 for head in part.heads} == set(part.kv_heads)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "allowed"),
    [(4, 2, [1, 2, 4]), (6, 2, [1, 2, 4, 6]), (5, 5, [1, 2, 3, 4, 5]), (8, 1, [1, 2, 3, 4, 5, 6, 7, 8]),
     (1, 1, [1]), (12, 3, [1, 2, 3, 6, 9, 12])],
)  # fmt: skip
def test_allowed_numbers_of_processes(heads, kv_heads, allowed):
    config = SimpleNamespace(heads=heads, kv_heads=kv_heads, mlp_width=100, vocab_size=100)
    assert allowed_ranks(config) == allowed


def test_a_number_that_does_not_divide_the_heads_is_refused_with_those_that_do():
    config = replace(FALCON, heads=64, kv_heads=8, mlp_width=512, vocab_size=512)
    with pytest.raises(
        ValueError, match=r"\(64\).*\(8\).*12 processes: start 1 to 8, 16, 24, 32, 40, 48, 56 or 64 of"
    ):
        Share(config, 0, 12)


@pytest.mark.parametrize(
    ("numbers", "listed"),
    [([1], "1"), ([1, 2], "1 or 2"), ([1, 2, 3, 4, 8], "1 to 4 or 8"), ([3, 5, 6, 7], "3 or 5 to 7")],
)
def test_numbers_are_listed_in_short(numbers, listed):
    assert list_numbers(numbers) == listed


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_each_process_has_the_slopes_of_its_heads(ranks):
    config = replace(MPT, heads=5, alibi=Alibi(5, bias_max=16.0))
    slopes = [part._own_config(config).alibi.slopes() for part in shares(config, ranks)]
    assert torch.equal(torch.cat(slopes), config.alibi.slopes())


@pytest.mark.parametrize(
    ("config", "split"),
    [
        (replace(NEOX, heads=4, head_dim=3), neox_files.split_heads),
        (replace(MPT, heads=4, head_dim=3), mpt_files.split_blocks),
        (replace(FALCON, heads=4, kv_heads=1, head_dim=3), falcon_files.split_groups),
        (replace(FALCON, heads=4, kv_heads=2, head_dim=3), falcon_files.split_groups),
    ],
)
@pytest.mark.parametrize("columns", [None, 5])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_cut_of_a_fused_tensor_equals_the_slices_of_its_parts(config, split, columns, ranks):
    rows = 3 * (config.heads + 2 * getattr(config, "kv_heads", config.heads))
    fused = torch.randn(rows) if columns is None else torch.randn(rows, columns)
    names = [f"layers.0.attention.{name}.weight" for name in "qkv"]
    for part in shares(config, ranks):
        slices = [part.slice(name) for name in names]
        wanted = [piece.of(whole) for piece, whole in zip(slices, split(fused, config), strict=True)]
        for got, expected in zip(cut(fused, split, config, slices), wanted, strict=True):
            assert torch.equal(got, expected)


def test_inductor_is_refused():
    config = replace(FALCON, position=Rope(10000.0, 8))
    model = Share(config, 0, 2).build(lambda own: falcon.Model(own), config)
    with pytest.raises(ValueError, match='take "flat"'):
        streamllm.compile(model, "inductor")


def test_an_engine_is_refused():
    config = CONFIGS["falcon 7b"]
    model = Share(config, 0, 2).build(lambda own: meta_model(own), config)
    with pytest.raises(ValueError, match="generate_batch"):
        streamllm.Engine(model, None)


def test_info_says_what_each_process_holds():
    result = CliRunner().invoke(cli, ["info", "--tensor-parallel", "3"])
    lines = [line for line in result.output.splitlines() if "rank" in line]
    assert [line.split(":")[0].split()[-1] for line in lines] == ["0", "1", "2"]
    assert "heads: 2 for queries, 2 for keys and values" in lines[2]
    assert "262.1 kB" in lines[2]
    lines = CliRunner().invoke(cli, ["info", "--tensor-parallel", "4"]).output.splitlines()
    assert any("each of ranks 0 to 3: heads: 1 for queries" in line for line in lines)


# Jobs


def test_without_torchrun_it_is_refused(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for call in (streamllm.load, streamllm.load_model):
        with pytest.raises(ValueError, match="torchrun"):
            call(tensor_parallel=True)
    result = CliRunner().invoke(cli, ["generate", "x", "--tensor-parallel"])
    assert isinstance(result.exception, ValueError)


def test_devices_without_collectives_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match='"cpu" and "cuda", not on "mps"'):
        join("mps")


def test_each_process_takes_the_cuda_device_of_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert _own_device(None) == _own_device("cuda") == torch.device("cuda:1")
    assert _own_device("cuda:0") == torch.device("cuda:0")
    assert _own_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 of this machine has no CUDA device: there are 2"):
        _own_device(None)


def test_an_error_of_a_collective_says_that_a_process_is_lost():
    where, reason = "[/gloo/transport/tcp/pair.cc:537] ", "Read error [::1]:28: Connection reset by peer"
    with pytest.raises(JobError) as raised, reporting_lost_processes():
        raise RuntimeError(f"{where}{reason}. This is typically caused by …")
    assert str(raised.value) == f"another process of this job has ended or cannot be reached ({reason})"
    with pytest.raises(torch.OutOfMemoryError), reporting_lost_processes():
        raise torch.OutOfMemoryError("CUDA out of memory")


def start_processes(*command: str, prompts: tuple[bytes, bytes]) -> list[subprocess.Popen]:
    """Two processes of one job, without torchrun, which would end one when it sees that the other has ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = []
    for rank, prompt in enumerate(prompts):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = subprocess.Popen(
            [sys.executable, "-m", "streamllm", *command], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        process.stdin.write(prompt)
        process.stdin.close()
        process.stdin = None
        started.append(process)
    return started


def test_one_process_prints_and_ends_when_the_other_dies():
    first, second = start_processes(
        "generate",
        "--tensor-parallel",
        "--device",
        "cpu",
        "-n",
        "forever",
        prompts=(b"def f(", b"never read"),
    )
    printed = b""
    while len(printed) < 60 and first.poll() is None:
        printed += os.read(first.stdout.fileno(), 100)
    second.send_signal(signal.SIGKILL)
    out, err = first.communicate(timeout=END_SECONDS)
    assert (printed + out).startswith(b"def f(")
    assert first.returncode == 2
    assert err.decode().count("Error: another process of this job has ended") == 1
    assert b"Traceback" not in err
    out, err = second.communicate(timeout=END_SECONDS)
    assert (out, err) == (b"", b"")


def test_an_error_of_all_processes_is_printed_by_one():
    started = start_processes("generate", "x", "-m", "/nowhere", "--tensor-parallel", prompts=(b"", b""))
    ended = [(process.communicate(timeout=90), process.returncode) for process in started]
    assert [code for _, code in ended] == [2, 2]
    assert ended[0][0][1].decode().startswith("Error: there is no folder '/nowhere'")
    assert ended[1][0] == (b"", b"")


def batch_of(folder, count):
    lines = [{"prompt": f"def f{number}(", "temperature": 1.0 * (number % 2)} for number in range(count)]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"prompt": "x", "top_p": -1.0}]))
    return ["batch", str(path), "--slots", "3", "--device", "cpu", "--dtype", "float64", "--seed", "1"]


def results_of(path):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda result: result["line"])


def test_two_processes_run_a_list_of_prompts(tmp_path):
    command = [*batch_of(tmp_path, 7), "-n", "12"]
    started = start_processes(*command, "-o", str(tmp_path / "two"), "--tensor-parallel", prompts=(b"", b""))
    ended = [(process.communicate(timeout=120), process.returncode) for process in started]
    assert [code for _, code in ended] == [1, 0]  # a line failed
    assert "8 of 8 lines have a result, 1 of them an error" in ended[0][0][1].decode()
    assert ended[1][0] == (b"", b"")
    assert (
        CliRunner().invoke(cli, [*command, "-o", str(tmp_path / "one")], standalone_mode=False).return_value
        == 1
    )
    assert results_of(tmp_path / "two") == results_of(tmp_path / "one")


def test_a_list_of_prompts_ends_when_a_process_dies(tmp_path):
    """The lines that are left have no result: the same command continues."""
    output = tmp_path / "results"
    command = [*batch_of(tmp_path, 400), "-n", "40", "-o", str(output), "--tensor-parallel"]
    first, second = start_processes(*command, prompts=(b"", b""))
    end = time.monotonic() + 90
    while not (output.exists() and output.read_bytes()) and time.monotonic() < end:
        time.sleep(0.02)
    second.send_signal(signal.SIGKILL)
    _, err = first.communicate(timeout=END_SECONDS)
    second.communicate(timeout=END_SECONDS)
    assert first.returncode == 2
    assert err.decode().count("Error: another process of this job has ended") == 1
    assert "run the same command again to continue" in err.decode()
    failed = [result for result in results_of(output) if "error" in result]
    assert [result["line"] for result in failed] in ([], [401])
    assert len(results_of(output)) < 401


def test_an_error_of_one_process_in_a_forward_ends_its_batch(monkeypatch):
    """It would go on with other rows than the others, which would not be noticed or wait for ever."""
    config = CONFIGS["falcon 7b"]
    for ranks, raised in ((1, True), (None, False)):
        part = None if ranks is None else Share(config, 0, 1)
        model = (
            MODELS[type(config)].Model(config)
            if part is None
            else part.build(lambda own: falcon.Model(own), config)
        )
        monkeypatch.setattr(model, "forward", mock.Mock(side_effect=torch.OutOfMemoryError("on purpose")))
        batch = Batch(model, 2, window=8)
        row = mock.Mock(
            is_paused=False,
            is_cancelled=False,
            **{"loop.cache": batch.slots.new_cache(), "loop.waiting.return_value": [1, 2, 3]},
        )
        batch.add(row)
        with pytest.raises(torch.OutOfMemoryError) if raised else nullcontext():
            batch.step()
        assert row.end.called is not raised
