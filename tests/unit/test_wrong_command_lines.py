"""Wrong command lines: no traceback, one sentence, exit code 2, within two seconds, and nothing computed."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time

import pytest

from streamllm.cli import COMMANDS, main

SECONDS = 2.0
BUSY = 5.0  # times as long as on an idle machine
HUGE = "99999999999999999999"
BAD_NUMBERS = ("many", "-1", HUGE, "1.5", "")
# Options that take one whole number, by command.
COUNTS = {
    "generate": ("--sinks", "--window", "--chunk", "--max-new-tokens", "--top-k", "--threads"),
    "perplexity": ("--tokens", "--chunk", "--dense-tokens", "--positions", "--batch", "--threads"),
    "inspect": ("--samples", "--length", "--span", "--tokens", "--chunk", "--threads"),
    "recall": ("--sinks", "--window", "--lines", "--every", "--samples", "--digits", "--chunk", "--threads"),
    "parity": ("--tokens",),
    "info": ("--sinks", "--window"),
}
MODEL_COMMANDS = ("generate", "perplexity", "inspect", "recall")
WITH_DEVICE = (*MODEL_COMMANDS, "parity")
WITH_DTYPE = (*MODEL_COMMANDS, "parity", "info", "convert")
WITH_OUTPUT = ("perplexity", "inspect", "recall")


def command_lines() -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("unknown",), ("--unknown",), ("generate", "a", "b")]
    for command, options in COUNTS.items():
        lines += [(command, option, bad) for option in options for bad in BAD_NUMBERS]
    for command in COMMANDS:
        lines.append((command, "--unknown"))
    for command in WITH_DEVICE:
        lines += [(command, "--device", device) for device in ("toaster", "cuda:99", "gpu", "", "cuda:x")]
    for command in WITH_DTYPE:
        name = ("x", "y") if command == "convert" else ()
        lines += [(command, *name, "--dtype", dtype) for dtype in ("int4", "", "FLOAT32")]
    for command in MODEL_COMMANDS:
        lines += [
            (command, "--quantize", "int2"),
            (command, "--seed", HUGE),
            (command, "--seed", "x"),
            (command, "-m", "./nowhere"),
            (command, "-m", ""),
            (command, "-m", "https://example.org/model"),
            (command, "--threads", "100000"),
            (command, "--revision", "main"),
        ]
    for command in WITH_OUTPUT:
        for option in ("--json", "--plot"):
            lines += [
                (command, option, "/nowhere/x.png"),
                (command, option, "/proc/x.png"),
                (command, option, "/"),
            ]
        lines.append((command, "--plot", "numbers.xyz"))
    lines += [("generate", "a", "-t", bad) for bad in ("1e-46", "-1", "nan", "inf", "hot", "1e-300")]
    lines += [("generate", "a", "--top-p", bad) for bad in ("0", "1.1", "nan", "x", "-inf")]
    lines += [("generate", "a", "--min-p", bad) for bad in ("-0.1", "2", "nan")]
    lines += [("generate", "a", "--repetition-penalty", bad) for bad in ("0", "-1", "nan", "inf")]
    lines += [
        ("generate", "a", "--stop", ""),
        ("generate", "a", "--compile", "llvm"),
        ("generate", "a", "--quantize-cache", "int4"),
        ("generate", "a", "--file", "/nowhere"),
        ("generate", "--file", "/"),
        ("generate", "a", "--ignore-eos", "--tokenizer-eos"),
        ("generate", "a", "--window", "99999999999999"),
        ("perplexity", "/nowhere"),
        ("perplexity", "--mode", "magic"),
        ("perplexity", "--mode", ""),
        ("perplexity", "--sinks", "4,x"),
        ("perplexity", "--window", f"100,{HUGE}"),
        ("perplexity", "--window", "99999999999999"),
        ("perplexity", "--resume", "/nowhere/state"),
        ("inspect", "--tokens", "300"),
        ("inspect", "--sinks", "300", "--span", "200"),
        ("inspect", "--span", "99999999999999"),
        ("recall", "--mode", "magic"),
        ("recall", "--back", "0"),
        ("recall", "--wording", "verse"),
        ("recall", "--window", "99999999999999"),
        ("parity", "--text", "/nowhere"),
        ("parity", "./nowhere"),
        ("info", "./nowhere"),
        ("convert", "./nowhere"),
        ("convert", "./nowhere", "out"),
        ("convert", "./nowhere", "out", "--max-shard-size", "big"),
        ("models", "x"),
    ]
    return lines


LINES = command_lines()


def run(capsys, monkeypatch, args: tuple[str, ...]) -> tuple[int, str, str, float]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one two"))
    started, computed = time.monotonic(), time.process_time()
    with pytest.raises(SystemExit) as end:
        main(list(args))
    # On a busy machine, only the time that is computed tells. A command that waits or retries takes far longer.
    seconds = max(time.process_time() - computed, (time.monotonic() - started) / BUSY)
    return end.value.code, *capsys.readouterr(), seconds


def test_there_are_many_wrong_command_lines() -> None:
    assert len(set(LINES)) >= 250


@pytest.mark.parametrize("args", LINES, ids=" ".join)
def test_a_wrong_command_line_is_an_error_of_one_sentence(args, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err, seconds = run(capsys, monkeypatch, args)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    sentences = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(sentences) == 1
    assert len(sentences[0]) > 20
    assert seconds < SECONDS
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["generate", "perplexity"])
def test_a_text_that_is_not_utf8_is_named(command, capsys, monkeypatch, tmp_path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9" * 100)
    options = ("--file", str(path)) if command == "generate" else (str(path),)
    code, _, err, _ = run(capsys, monkeypatch, (command, *options))
    assert code == 2
    assert "not UTF-8" in err
    assert str(path) in err


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_results_that_cannot_be_written_are_known_before_the_computation(
    option, capsys, monkeypatch, tmp_path
):
    file = tmp_path / "missing" / "x.png"
    code, _, err, _ = run(capsys, monkeypatch, ("perplexity", option, str(file)))
    assert code == 2
    assert "there is no folder" in err


def test_numbers_that_cannot_be_written_after_all_are_kept(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "t.txt").write_text("hello world " * 40)
    args = ("perplexity", str(tmp_path / "t.txt"), "--window", "20", "--json", "/dev/full")
    code, out, err, _ = run(capsys, monkeypatch, args)
    assert (code, "tokens" in out) == (2, True)
    kept = next(tmp_path.glob("streamllm-*.json"))
    assert str(kept) in err
    assert '"results"' in kept.read_text()


def started(*args: str, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "streamllm", *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("seconds", [0.2, 0.5, 1.0, 1.6, 2.2])
def test_ctrl_c_during_the_imports_shows_no_traceback(seconds) -> None:
    process = started("generate", "one", "-n", "forever", "--ignore-eos", "-q")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert b"streamllm" not in err or b"Traceback" not in err


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_sigterm_ends_the_command_as_ctrl_c_does() -> None:
    process = started("generate", "one", "-n", "forever", "--ignore-eos")
    assert process.stdout is not None
    assert process.stdout.read(30).startswith(b"one")
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert b"Traceback" not in err


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_closed_standard_output_is_an_error_of_one_sentence() -> None:
    shell = f"{sys.executable} -m streamllm generate one -n 2 >&-"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "Error: standard output is closed: give it a file, or /dev/null\n"


def test_the_prompt_is_not_repeated_with_no_echo(capsys, monkeypatch) -> None:
    with_prompt = run(capsys, monkeypatch, ("generate", "def ", "-n", "5", "-t", "0", "-q"))
    without = run(capsys, monkeypatch, ("generate", "def ", "-n", "5", "-t", "0", "-q", "--no-echo"))
    assert with_prompt[1] == "def " + without[1]


@pytest.mark.parametrize("command", MODEL_COMMANDS)
def test_every_command_with_a_model_has_the_same_options(command, capsys, monkeypatch) -> None:
    code, out, _, _ = run(capsys, monkeypatch, (command, "--help"))
    assert code == 0
    for option in (
        "--model",
        "--revision",
        "--dtype",
        "--device",
        "--threads",
        "--quantize",
        "--allow-pickle",
    ):
        assert option in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command) -> None:
    for parameter in COMMANDS[command].params:
        assert parameter.param_type_name == "argument" or getattr(parameter, "help", None)


def test_a_device_that_is_not_there_is_a_value_error() -> None:
    import streamllm

    for device in ("cuda:99", "toaster"):
        with pytest.raises(ValueError, match="cannot be used here"):
            streamllm.load_model(device=device)
