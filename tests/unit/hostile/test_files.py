"""Files that are missing, damaged, or something else than a file; and code in a checkpoint."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import streamllm
from tests.tiny import SINGLE
from tests.unit.hostile.samples import (
    BRACKETS,
    DEEP,
    GENERATION,
    INTACT,
    LFS,
    NOT_INTACT,
    PIECES,
    SHARDED,
    SHARDS,
    TOKENIZER,
    Files,
    build,
    check_refused,
    link,
    load_and_run,
    with_config,
    without,
)

# The files, the name of one of them, its new content, and the error.
REPLACED: dict[str, tuple[Files, str, Any, str]] = {
    "weights: a folder": (INTACT, SINGLE, Path.mkdir, "is a folder, not a file"),
    "weights: a pipe": (INTACT, SINGLE, os.mkfifo, "is a pipe or a device, not a file"),
    "weights: a device": (INTACT, SINGLE, link("/dev/zero"), "is a link out of the folder"),
    "weights: a link out": (INTACT, SINGLE, link("/etc/hostname"), "is a link out of the folder"),
    "weights: a link to nothing": (INTACT, SINGLE, link("gone"), "is a link to a file that does not exist"),
    "weights: a pointer": (INTACT, SINGLE, LFS, "is a git-lfs pointer, not the file itself; run 'git lfs"),
    "weights: nothing": (INTACT, SINGLE, None, "has no weights: neither model.safetensors nor"),
    "shard: half of it": (SHARDED, SHARDS[1], SHARDED[SHARDS[1]][:500], NOT_INTACT),
    "shard: a folder": (SHARDED, SHARDS[1], Path.mkdir, "is a folder, not a file"),
    "shard: a pipe": (SHARDED, SHARDS[1], os.mkfifo, "is a pipe or a device, not a file"),
    "shard: a link out": (SHARDED, SHARDS[1], link("/etc/hostname"), "is a link out of the folder"),
    "shard: a loop": (SHARDED, SHARDS[1], link(SHARDS[1]), "cannot be read"),
    "shard: nothing": (SHARDED, SHARDS[1], None, f"has no file '{SHARDS[1]}'"),
    "config: a pipe": (INTACT, "config.json", os.mkfifo, "is a pipe or a device, not a file"),
    "config: a link out": (INTACT, "config.json", link("/etc/hostname"), "is a link out of the folder"),
    "config: nothing": (INTACT, "config.json", None, "has no config.json"),
    "config: empty": (INTACT, "config.json", b"", "is not valid JSON"),
    "config: a list": (INTACT, "config.json", b"[]", "must hold a JSON object"),
    "config: Latin-1": (INTACT, "config.json", b'{"model_type": "\xe9"}', "cannot be read as text"),
    "config: nested deeply": (INTACT, "config.json", DEEP, "nested too deeply"),
    "config: 9,999 digits": (INTACT, "config.json", b'{"layers": %b}' % (b"9" * 9_999), "not valid JSON"),
    "generation: not JSON": (INTACT, GENERATION, b"{", "is not valid JSON"),
    "generation: a list": (INTACT, GENERATION, b"[]", "must hold a JSON object"),
    "generation: a link out": (INTACT, GENERATION, link("/etc/hostname"), "is a link out of the folder"),
    "generation: eos as text": (INTACT, GENERATION, b'{"eos_token_id": "</s>"}', "eos_token_id is"),
    "generation: temperature below 0": (INTACT, GENERATION, b'{"do_sample": true, "temperature": -1}', "temperature"),
    "generation: a NaN": (INTACT, GENERATION, b'{"do_sample": true, "top_p": NaN}', "top_p"),
    "generation: a list as top_k": (INTACT, GENERATION, b'{"do_sample": true, "top_k": [1]}', "top_k"),
    "tokenizer: nothing": (INTACT, TOKENIZER, None, "has no tokenizer"),
    "tokenizer: empty": (INTACT, TOKENIZER, b"", "tokenizer.json"),
    "tokenizer: a list": (INTACT, TOKENIZER, b"[]", "tokenizer.json"),
    "tokenizer: nested deeply": (INTACT, TOKENIZER, DEEP, "tokenizer.json"),
    "tokenizer: brackets": (INTACT, TOKENIZER, BRACKETS, "tokenizer.json"),
    "tokenizer: a link out": (INTACT, TOKENIZER, link("/etc/hostname"), "is a link out of the folder"),
    "tokenizer: a pipe": (INTACT, TOKENIZER, os.mkfifo, "is a pipe or a device, not a file"),
    "tokenizer config: a list": (INTACT, "tokenizer_config.json", b"[]", "tokenizer_config.json"),
    "tokenizer config: nested": (INTACT, "tokenizer_config.json", DEEP, "tokenizer_config.json"),
    "tokenizer config: a link out": (INTACT, "tokenizer_config.json", link("/etc/hostname"), "is a link out"),
    "sentencepiece: noise": (PIECES, "tokenizer.model", b"\x0a\xff\xff\xff\xff\x0f" * 50, "tokenizer.model"),
    "sentencepiece: empty": (PIECES, "tokenizer.model", b"", "tokenizer.model"),
}  # fmt: skip


@pytest.mark.parametrize("case", REPLACED)
def test_replaced_files(tmp_path, case):
    files, name, other, pattern = REPLACED[case]
    check_refused(tmp_path, without(files, name) | ({} if other is None else {name: other}), pattern)


def test_adapter(tmp_path):
    files = without(INTACT, "config.json") | {"adapter_config.json": b"{}"}
    check_refused(tmp_path, files, "holds only an adapter; merge it")


HALF = b'"\\ud83d"'  # half of a surrogate pair: JSON can spell it, but no library accepts it


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_half_of_a_surrogate_pair_as_a_token(tmp_path, kind):
    files = INTACT
    if kind == "sentencepiece":
        import sentencepiece

        made = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["one two three four"] * 9),
            model_writer=made,
            vocab_size=270,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=9,
        )
        files = PIECES | {"tokenizer.model": made.getvalue()}
        check_refused(
            tmp_path / "added",
            files | {"added_tokens.json": b"{" + HALF + b": 270}"},
            "added token .* has id 270; a token must be valid text",
        )
    named = files | {
        "tokenizer_config.json": b'{"unk_token": ' + HALF + b"}",
        "special_tokens_map.json": b"{}",
    }
    tokenizer = streamllm.load_tokenizer(build(tmp_path / "named", named))
    assert tokenizer.token_to_id("\ud83d") is None
    assert tokenizer.decode(tokenizer.encode("two")).strip() == "two"


def test_no_code_of_the_checkpoint_runs(tmp_path):
    """Neither from a module that the config names, nor from a pickle beside or instead of the weights."""
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')".encode()
    pickle = b"cbuiltins\nexec\n(V" + code + b"\ntR."
    evil = {
        "modeling_evil.py": code,
        "configuration_evil.py": code,
        "__init__.py": code,
        "pytorch_model.bin": pickle,
    }
    named = with_config(
        auto_map={"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    )
    load_and_run(build(tmp_path / "beside", named | evil))
    check_refused(
        tmp_path / "instead",
        without(named, SINGLE) | evil,
        "only as pytorch_model.bin, a pickle",
    )
    assert not mark.exists()


@pytest.mark.parametrize("filler", [b"{},", b"[],", b"1,", b'"",'], ids=str)
def test_config_that_is_too_large(tmp_path, filler):
    """Small values take 20 times their text in memory, so the file is refused before it is parsed."""
    text = b'{"a": [' + filler * (34_000_000 // len(filler)) + b"0]}"
    check_refused(
        tmp_path,
        INTACT | {"config.json": text},
        r"at most [\d,]+ are allowed|more than [\d,]+ lists and objects",
    )


def test_command_line_prints_one_sentence(tmp_path):
    build(tmp_path, INTACT | {SINGLE: INTACT[SINGLE][:-1]})
    arguments = [sys.executable, "-m", "streamllm", "generate", "hello", "--model", str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"Error: .* is not an intact safetensors file .*; download it again\n", done.stderr)
