"""`streamllm chat`, with its input from a pipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer as Library

from streamllm.cli import cli
from tests.unit.chat.samples import STYLES
from tests.unit.conftest import write_llama, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    write_tokenizer(folder, bos=True)
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    library.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(STYLES["chatml"])
    return write_llama(folder, library.get_vocab_size())


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
