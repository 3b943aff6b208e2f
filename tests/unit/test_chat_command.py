"""`streamllm chat`, with its input from a pipe."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from streamllm.cli import cli
from tests.unit.conftest import write_chat_tokenizer, write_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    ids = write_chat_tokenizer(folder)
    return write_llama(folder, ids)


def run(*arguments: object, lines: str = "") -> str:
    result = CliRunner().invoke(
        cli, ["chat", "--device", "cpu", "-n", "8", *map(str, arguments)], input=lines, catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.output


def test_messages_and_commands(folder: Path, tmp_path: Path) -> None:
    lines = (
        f"Hello\n/stats\n/visible\n/undo\n/undo\n/nothing\n/save {tmp_path / 'a'}\n/help\nHi\n/retry\n/drop\n"
    )
    shown = run("--model", folder, "--system", "Be brief.", lines=lines)
    for wanted in ("tokens seen", "Be brief.<|im_end|>", "took 3 turns back", "no turn to undo", "no command /nothing",
                   "saved to", "/fork FILE", "0 system: Be brief.", "1 user: Hi"):  # fmt: skip
        assert wanted in shown, wanted


def test_a_session_is_resumed(folder: Path, tmp_path: Path) -> None:
    session = tmp_path / "talk.session"
    run("--model", folder, "--session", session, lines="Hello\n")
    shown = run("--model", folder, "--session", session, "--resume", lines="/drop\nand more\n/drop\n")
    assert "user: Hello" in shown
    assert "3 assistant" in shown


def turns_in(folder: Path, session: Path) -> str:
    return run("--model", folder, "--session", session, "--resume", lines="/drop\n")


def test_what_a_command_changes_is_saved(folder: Path, tmp_path: Path) -> None:
    session = tmp_path / "talk.session"
    run("--model", folder, "--session", session, lines="Hello\nmore\n/undo\n")
    assert "more" not in turns_in(folder, session)
    run("--model", folder, "--session", session, "--resume", lines="/drop 0\n")
    assert "Hello" not in turns_in(folder, session)


def test_a_session_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    session, other = tmp_path / "talk.session", tmp_path / "other.session"
    run("--model", folder, "--session", session, lines="Hello\n")
    before = session.read_bytes()
    result = CliRunner().invoke(cli, ["chat", "--model", str(folder), "--session", str(session)])
    assert result.exit_code == 2
    assert "exists already: give --resume" in result.output
    run("--model", folder, "--session", other, lines=f"Guten Tag\n/load {session}\nand then\n")
    assert "Guten Tag" in turns_in(folder, other)
    assert session.read_bytes() != before
    shown = turns_in(folder, session)
    assert "and then" in shown
    assert "Hello" in shown


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--window", "30"], "window=40, not 30"),
        (["--recent-size", "30"], "leave --recent-size out"),
        (["--sinks", "2"], "sinks=3, not 2"),
        (["--sinks", "system"], "sinks=3, not system"),
        (["--quantize-cache", "int8"], "quantize=None, not int8"),
        (["--evict", "token"], "evict=turn, not token"),
        (["--chunk", "7"], "chunk="),
        (["--system", "Be long."], "its own system prompt"),
    ],
)
def test_a_resumed_session_refuses_other_settings(
    folder: Path, tmp_path: Path, arguments: list[str], match: str
) -> None:
    session = tmp_path / "talk.session"
    same = ["--model", str(folder), "--session", str(session), "--window", "40", "--sinks", "3"]
    run(*same, "--system", "Be brief.", lines="Hello\n")
    before = session.read_bytes()
    result = CliRunner().invoke(cli, ["chat", *same[:4], "--resume", *arguments], input="more\n")
    assert result.exit_code == 2
    assert match in result.output
    assert session.read_bytes() == before
    assert "2 assistant" in run(
        *same, "--system", "Be brief.", "--evict", "turn", "--resume", lines="/drop\n"
    )


def test_a_retry_says_the_system_prompt_again_and_draws_anew(folder: Path, tmp_path: Path) -> None:
    session = tmp_path / "talk.session"
    options = ("--model", folder, "--session", session, "--seed", 3, "-t", 1)
    first = run(*options, "--system", "Be brief.", lines="Hello\n")
    shown = run(*options, "--resume", lines="/retry\n/drop\n/retry\n")
    assert "0 system: Be brief." in shown
    answers = [line for line in [*first.splitlines()[1:], *shown.splitlines()[1:]] if line and line[0] != " "]
    assert len(set(answers)) == 3


def test_a_text_that_repeats_itself_is_told() -> None:
    shown = run("-t", 0, "-n", 400, lines="a = 1\n" * 2)
    assert "of the last text repeats itself; /undo" in shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_session_is_saved_when_the_terminal_is_closed(folder: Path, tmp_path: Path, number: int) -> None:
    session = tmp_path / "talk.session"
    command = [
        sys.executable, "-m", "streamllm", "chat", "--device", "cpu", "-n", "forever", "--model", str(folder),
        "--session", str(session),
    ]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write(b"Hello\n")
        chat.stdin.flush()
        while b"/help" not in chat.stdout.readline():
            pass
        chat.stdout.read(20)  # of the answer
        chat.send_signal(number)
        chat.stdout.read()
    assert chat.returncode == 128 + number
    assert "1 assistant" in turns_in(folder, session)


def test_a_file_of_prompts(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        json.dumps({"turns": ["one", "two"]}) + "\n\n" + json.dumps({"prompt": "three"}) + "\n"
    )
    shown = run("--model", folder, "--prompts", prompts, "--start-size", 4, "--recent-size", 99)
    assert [line for line in shown.splitlines() if line.startswith("> ")] == ["> one", "> two", "> three"]


def test_a_model_without_a_template_continues_the_text() -> None:
    assert "continues the text" in run(lines="def add(a, b):\n")


def test_dense_keeps_the_trained_length(folder: Path) -> None:
    assert "sinks=0, window=256" in run("--model", folder, "--dense", lines="/help\n")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--resume"], "--resume needs --session"),
        (["--dense", "--window", "9"], "--dense keeps everything"),
        (["--recent-size", "9", "--window", "9"], "not both"),
        (["--sinks", "many"], "neither a number of tokens nor 'system'"),
    ],
)
def test_wrong_options(arguments: list[str], match: str) -> None:
    result = CliRunner().invoke(cli, ["chat", *arguments])
    assert result.exit_code == 2
    assert match in result.output


def test_quit_ends_the_chat_and_a_session_in_a_missing_folder_is_refused_at_once(tmp_path) -> None:
    assert "never read" not in run(lines="/quit\nnever read\n/stats\n")
    assert "tokens seen" not in run(lines="/exit\n/stats\n")
    done = CliRunner().invoke(cli, ["chat", "--session", str(tmp_path / "missing" / "file")])
    assert done.exit_code == 2
    assert "there is no folder" in done.output
