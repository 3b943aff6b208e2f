"""README.md: its Python blocks run in order, its commands parse, its files exist, and it stays short."""

import json
import re
import shlex
from pathlib import Path

import click
import pytest
import torch
from tokenizers import Tokenizer as Library

import streamllm
from streamllm.cli import cli
from tests.unit.chat.samples import STYLES
from tests.unit.conftest import write_llama, write_tokenizer

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
NAME = '"EleutherAI/pythia-160m"'  # the block that loads it is given a folder instead


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every call of the command line, in console blocks, tables and sentences."""
    lines = [
        line.partition("#")[0]
        for block in blocks("console")
        for line in block.splitlines()
        if line[:2] == "$ "
    ]
    quoted = re.findall(r"`([^`\n]+)`", TEXT)
    parts = [part for line in (*lines, *quoted) for part in line.removeprefix("$ ").split("&&")]
    found = [re.search(r"(?:^|-m )streamllm (.+)", part.strip()) for part in parts]
    return [match[1] for match in found if match]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a chat template."""
    folder = tmp_path_factory.mktemp("readme")
    write_tokenizer(folder, bos=True)
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|eot_id|>"])
    library.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(STYLES["chatml"])
    return write_llama(folder, library.get_vocab_size())


@pytest.mark.filterwarnings("ignore:sinks . window")
def test_all_python_blocks_run_in_order(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    code = blocks("python")
    assert len(code) >= 4
    assert NAME in code[0]
    for block in code:
        exec(block.replace(NAME, repr(str(folder))), names)
    assert capsys.readouterr().out
    assert (tmp_path / "talk.session").is_file()
    model = names["model"]
    again = streamllm.load_model(tmp_path / "trained", device="cpu")
    assert torch.equal(again.embed.weight, model.embed.weight)
    assert not torch.equal(again.embed.weight, streamllm.load_model(folder, device="cpu").embed.weight)
    assert torch.allclose(names["exported"].module()(names["tokens"]), model(names["tokens"]), atol=1e-4)


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    optional = (
        re.sub(r"\[([^\]]*)\]", r"\1", command)
        .replace("FILE …", "text.txt")
        .replace("FILE.jsonl", "text.txt")
    )
    optional = re.sub(r"\bN\b", "8", optional)
    (tmp_path / "text.txt").touch()
    words = shlex.split(optional)
    name, arguments = words[0], words[1:]
    found = cli.get_command(click.Context(cli), name)
    assert found is not None, f"there is no command {name}"
    found.make_context(name, arguments)


def test_every_file_that_it_names_exists():
    links = re.findall(r"\]\(((?!https?:|#)[^)]+)\)", TEXT)
    programs = re.findall(r"tools/[a-z_0-9]+\.py", TEXT)
    tests = re.findall(r"`(tests/[a-z_/.]+)`", TEXT)
    assert len(links) >= 2
    assert len(programs) >= 5
    for name in {*links, *programs, *tests}:
        assert (ROOT / name).exists(), name


def test_the_caption_of_the_picture_says_what_the_reports_print():
    caption = TEXT.partition("*The embedded checkpoint on")[2].partition(".*\n")[0]
    printed = (ROOT / "tools/report/report.md").read_text(encoding="utf-8")
    tokens, memory = re.findall(r"^ ([0-9,]+) held-out|: ([0-9.]+) MiB", caption)
    assert f"{tokens[0]} tokens of" in printed
    assert printed.count(f"{memory[1]} |") >= 1
    budgets = json.loads((ROOT / "tools/report/smollm2/report.json").read_text(encoding="utf-8"))["budgets"]
    held = re.findall(r"holding ([0-9,]+)[^0-9]+([0-9.]+)[^0-9]+([0-9.]+[0-9])", caption)
    assert len(held) == 3
    for budget, window, sinks in held:
        found = budgets[budget.replace(",", "")]
        assert (f"{found['window']:.1f}", f"{found['sinks']:.1f}") == (window, sinks)


def test_it_has_at_most_250_lines():
    assert len(TEXT.splitlines()) <= 250
