"""The command line in use: sources of the prompt, messages about wrong input, exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamllm
from streamllm.cli import COMMANDS, main


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys, monkeypatch) -> Callable[..., Result]:
    def run(*args: object, typed: bytes | None = None) -> Result:
        """Run the command line in this process. `typed` is standard input; None: a terminal."""
        stdin = io.TextIOWrapper(io.BytesIO(typed or b""), encoding="utf-8")
        monkeypatch.setattr(stdin, "isatty", lambda: typed is None, raising=False)
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        return Result(end.value.code, *capsys.readouterr())

    return run


def test_help_lists_every_command_and_every_command_has_a_help_text(run) -> None:
    result = run("--help")
    assert result.code == 0
    listed = result.out.partition("Commands:\n")[2]
    assert re.findall(r"^  (\w+) +\w.*$", listed, re.MULTILINE) == list(COMMANDS)
    assert "..." not in listed  # no first sentence is cut off
    for name in COMMANDS:
        result = run(name, "-h")
        assert result.code == 0
        assert result.out.startswith("Usage:")
        assert "RANGE" not in result.out  # click's word for a number between two limits
        assert not re.search(r"[0-9]{7}", result.out)  # nor a limit that nobody reaches
    assert run("--version").out.strip().endswith(streamllm.__version__)
    assert run("unknown").code == 2


def test_the_prompt_and_the_generated_text_go_to_standard_output(run, checkpoint, loaded) -> None:
    text = "".join(streamllm.Stream(*loaded).generate("one two", max_new_tokens=20, eos=[]))
    result = run("generate", "one two", "-m", checkpoint, "-n", 20, "--ignore-eos", "--device", "cpu")
    assert (result.code, result.out) == (0, f"one two{text}\n")
    assert re.fullmatch(r"20 tokens · [\d.,]+ tokens/s · place \d+ · cache [\d.]+ MB.*\n", result.err)
    assert run("generate", "a", "-m", checkpoint, "-n", 2, "--quiet").err == ""


def test_the_prompt_may_come_from_a_file_or_from_standard_input(run, checkpoint, tmp_path: Path) -> None:
    text = "für alle\r\nZeilen"
    options = ("-m", checkpoint, "-n", 5, "-q")
    expected = run("generate", "für alle\nZeilen", *options)
    assert expected.code == 0
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    assert run("generate", "--file", tmp_path / "prompt.txt", *options) == expected
    assert run("generate", *options, typed="für alle\nZeilen".encode()) == expected
    assert run("generate", "--file", "-", *options, typed="für alle\nZeilen".encode()) == expected
    assert run("generate", *options).code == 0  # no prompt, on a terminal, with a tokenizer that adds BOS


def test_options_reach_the_stream(run, checkpoint, loaded) -> None:
    stream = streamllm.Stream(*loaded, sinks=1, window=7, chunk=3)
    pieces = stream.generate(
        "one", max_new_tokens=40, temperature=1.3, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2,
        seed=5, eos=[],
    )  # fmt: skip
    options = ("-m", checkpoint, "-n", 40, "-t", 1.3, "--top-k", 9, "--top-p", 0.9, "--min-p", 0.01,
               "--repetition-penalty", 1.2, "--seed", 5, "--sinks", 1, "--window", 7, "--chunk", 3,
               "--ignore-eos")  # fmt: skip
    result = run("generate", "one", *options)
    assert result.out == "one" + "".join(pieces) + "\n"
    stop = result.out[6:9]
    again = run("generate", "one", *options, "--stop", stop)
    assert again.out == result.out[: result.out.index(stop, 3)] + "\n"


def test_the_cache_can_be_stored_in_int8(run, checkpoint, loaded) -> None:
    stream = streamllm.Stream(*loaded, window=9, quantize="int8")
    pieces = stream.generate("one", max_new_tokens=40, temperature=0.0, eos=[])
    options = ("-m", checkpoint, "-n", 40, "-t", 0, "--window", 9, "--ignore-eos")
    result = run("generate", "one", *options, "--quantize-cache", "int8")
    assert result.out == "one" + "".join(pieces) + "\n"
    wrong = run("generate", "one", *options, "--quantize-cache", "int4")
    assert wrong.code == 2
    assert "'int4' is not 'int8'" in wrong.err


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_weights_can_be_rounded_with_a_compiled_step(run, checkpoint, quantize) -> None:
    model = streamllm.load_model(checkpoint, quantize=quantize)
    stream = streamllm.Stream(
        streamllm.compile(model, "flat"), streamllm.load_tokenizer(checkpoint), window=9
    )
    pieces = stream.generate("one", max_new_tokens=40, temperature=0.0, eos=[])
    options = ("-m", checkpoint, "-n", 40, "-t", 0, "--window", 9, "--ignore-eos", "--quantize", quantize)
    assert run("generate", "one", *options, "--compile", "flat").out == "one" + "".join(pieces) + "\n"
    wrong = run("generate", "one", *options, "--compile", "llvm")
    assert wrong.code == 2
    assert "'llvm' is not one of" in wrong.err


def test_a_backend_that_does_not_work_here_is_an_error_of_one_sentence(run, checkpoint, monkeypatch) -> None:
    options = ("generate", "one", "-m", checkpoint, "-n", 1, "--device", "cpu", "--compile")
    wrong = run(*options, "cudagraphs")
    assert wrong.code == 2
    assert 'needs a model on CUDA, and this one is on cpu: take "flat"' in wrong.err
    monkeypatch.setenv("CXX", "/nonexistent")
    wrong = run(*options, "inductor")
    assert wrong.code == 2
    assert "needs a C++ compiler, and /nonexistent was not found: install" in wrong.err
    assert "Traceback" not in wrong.err


def test_a_window_beyond_the_trained_length_is_a_warning(run, checkpoint) -> None:
    result = run("generate", "a", "-m", checkpoint, "-n", 1, "--window", 300)
    assert result.code == 0
    assert result.err.startswith("Warning: sinks + window = 304 is longer than the 256 tokens")


# Errors that a user can cause: one sentence, exit code 2


def config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    changed = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)


def remove_a_shard(folder: Path) -> None:
    everything = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(everything, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shrink_vocabulary(folder: Path) -> None:
    config(folder, vocab_size=50)
    weights = load_file(folder / "model.safetensors")
    names = ("model.embed_tokens.weight", "lm_head.weight")
    tensors(folder, **{name: weights[name][:50].clone() for name in names})


BROKEN = {
    "no-config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "bad-json": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "foreign": (lambda folder: config(folder, model_type="gptj"), "model_type is 'gptj'; supported: .*llama"),
    "quantised": (lambda folder: config(folder, quantization_config={"bits": 4}), "quantised checkpoints"),
    "bad-value": (lambda folder: config(folder, hidden_size="wide"), "hidden_size is 'wide'"),
    "no-weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    "lost-shard": (remove_a_shard, "model-00001-of-00001.safetensors"),
    "cut-off": (
        lambda folder: os.truncate(folder / "model.safetensors", 9999),
        "not an intact safetensors file",
    ),
    "lost-tensor": (lambda folder: tensors(folder, **{"model.norm.weight": None}), "norm.weight"),
    "misshapen": (
        lambda folder: tensors(folder, **{"model.norm.weight": torch.ones(31)}),
        r"model.norm.weight has the shape \[31\].*\[32\]",
    ),
    "extra-tensor": (lambda folder: tensors(folder, mystery=torch.ones(3)), "no place for mystery"),
    "no-tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "copy has no tokenizer"),
    "bad-tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "small-vocabulary": (shrink_vocabulary, r"token id \d+ is outside the model's vocabulary of 0 … 49"),
    "bad-settings": (
        lambda folder: (folder / "generation_config.json").write_text('{"num_beams": 4}'),
        "num_beams=4, which is not supported",
    ),
    "not-finite": (
        lambda folder: tensors(folder, **{"model.norm.weight": torch.full((32,), torch.inf)}),
        "logits are not finite",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_checkpoint_is_an_error_of_one_sentence(run, copy: Path, fault: str) -> None:
    change, message = BROKEN[fault]
    change(copy)
    result = run("generate", "one", "-m", copy, "-q", "-n", 3)
    assert result.code == 2
    sentence = [line for line in result.err.splitlines() if not line.startswith("Warning: ")]
    assert len(sentence) == 1
    assert re.match(f"Error: .*{message}", sentence[0])


WRONG = {
    "no such folder": (["-m", "./nowhere"], "there is no folder './nowhere'"),
    "window 0": (["--window", "0"], "--window"),
    "sinks -1": (["--sinks", "-1"], "--sinks"),
    "no room": (["--sinks", "256"], "256 sinks leave no room"),
    "chunk 0": (["--chunk", "0"], "--chunk"),
    "tokens -1": (["-n", "-1"], "neither a number of tokens nor 'forever'"),
    "tokens many": (["-n", "many"], "neither a number of tokens nor 'forever'"),
    "temperature": (["-t", "-1"], "--temperature"),
    "temperature nan": (["-t", "nan"], "temperature must be 0"),
    "top-p": (["--top-p", "0"], "--top-p"),
    "seed": (["--seed", "9" * 30], "seed must be"),
    "stop": (["--stop", ""], "stop string must not be empty"),
    "dtype": (["--dtype", "int4"], "dtype is 'int4'; supported: auto, float64"),
    "device": (["--device", "toaster"], "--device.*'toaster'"),
    "device number": (["--device", "cuda:99"], "--device.*'cuda:99'"),
    "window too large": (["--window", str(10**13)], "not enough memory"),
    "revision": (["--revision", "main"], "a folder has no revision 'main'"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_option_is_an_error_of_one_sentence(run, checkpoint: Path, fault: str) -> None:
    options, message = WRONG[fault]
    model = [] if "-m" in options else ["-m", checkpoint]
    result = run("generate", "one", *model, *options)
    assert result.code == 2
    sentence = [line for line in result.err.splitlines() if line.startswith("Error: ")]
    assert len(sentence) == 1
    assert re.search(message, sentence[0])
    assert result.out == ""


def test_a_wrong_prompt_is_an_error_of_one_sentence(
    run, checkpoint, checkpoint_without_bos, tmp_path
) -> None:
    for prompt in ((), ("",)):
        result = run("generate", *prompt, "-m", checkpoint_without_bos, "-q")
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("Error: the prompt is empty and the tokenizer adds no BOS token")
    result = run("generate", "a", "--file", __file__, "-m", checkpoint)
    assert result.code == 2
    assert "give a prompt or a --file, not both" in result.err
    for wrong in (tmp_path, tmp_path / "nothing"):
        result = run("generate", "--file", wrong, "-m", checkpoint)
        assert result.code == 2
        assert "--file" in result.err
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for options, typed in ((("--file", tmp_path / "latin"), None), ((), b"caf\xe9")):
        result = run("generate", *options, "-m", checkpoint, typed=typed)
        assert (result.code, result.out) == (2, "")
        assert re.match(r"Error: the prompt is not UTF-8.*\n$", result.err)


# Interruption, in a process of its own


def start(*args: object, **options: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "streamllm", *map(str, args)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # on a busy machine two threads wait for each other
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=one_thread,
        preexec_fn=react_to_ctrl_c,
        **options,
    )


def react_to_ctrl_c() -> None:
    """A process that a shell starts in the background ignores Ctrl-C, and so do its children: undo that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and pipes")
def test_a_closed_pipe_and_ctrl_c_end_generation_without_a_traceback(checkpoint: Path) -> None:
    args = ("generate", "one", "-m", checkpoint, "-n", "forever", "--ignore-eos")
    piped = start(*args, stdout=subprocess.PIPE)
    stopped = start(*args, stdout=subprocess.PIPE)
    assert piped.stdout.read(100).startswith(b"one")
    piped.stdout.close()
    assert stopped.stdout.read(100).startswith(b"one")
    stopped.send_signal(signal.SIGINT)
    stopped.stdout.read()
    assert (piped.stderr.read(), piped.wait(120)) == (b"", 141)
    status = stopped.stderr.read().decode()
    assert stopped.wait(120) == 130
    assert re.fullmatch(r"[\d,]+ tokens · .*\n\n?", status)
