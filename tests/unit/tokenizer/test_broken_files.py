"""Files and texts that cannot be used raise a TokenizerError."""

import contextlib
import json
import os
import random
import re
import subprocess
import sys

import pytest
from tokenizers import Regex, pre_tokenizers

from streamllm.tokenizer import TokenizerError, files, load_tokenizer_files
from tests.unit.tokenizer import samples
from tests.unit.tokenizer.samples import PIECES, byte_level, train, word_piece, write


@pytest.mark.parametrize("name", ["byte_level", "llama", "sp_open_llama"])
def test_text_that_cannot_be_encoded(name, folders):
    tokenizer = load_tokenizer_files(folders(name)[0])
    with pytest.raises(TokenizerError, match=r"U\+D800 at index 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(TypeError, match="takes a str, not bytes"):
        tokenizer.encode(b"ab")


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match="holds no tokenizer") as caught:
        load_tokenizer_files(tmp_path)
    assert "tokenizer.json" in str(caught.value)
    assert "tokenizer.model" in str(caught.value)
    write(tmp_path, vocab={"a": 0})
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(TokenizerError, match=r"only vocab\.json and merges\.txt for a tokenizer"):
        load_tokenizer_files(tmp_path)


def changed(**changes):
    """A small tokenizer.json with some values replaced; `a__b` is the key b in the object a."""
    content = json.loads(word_piece().to_str())
    for path, value in changes.items():
        target, *rest = path.split("__")
        if rest:
            content[target][rest[0]] = value
        else:
            content[target] = value
    return json.dumps(content)


def added(content, index):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"content": content, "id": index} | flags


STRIP_ALL = {"type": "Strip", "content": "a", "start": 1, "stop": 1}
BAD_JSON = {
    "empty": "",
    "not JSON": "hello",
    "truncated": changed()[:-20],
    "list": "[]",
    "null": "null",
    "number": "3",
    "object": "{}",
    "nul bytes": "\0" * 100,
    "deep lists": "[" * 300_000,
    "deep objects": '{"a":' * 300_000,
    "deep decoder": changed(decoder=json.loads('{"type":"Sequence","decoders":[' * 100 + "]}" * 100)),
    "no model": changed(model=None),
    "unknown model": changed(model__type="Mamba"),
    "unknown decoder": changed(decoder={"type": "Python"}),
    "ids as text": changed(model__vocab={"a": "0"}),
    "negative id": changed(model__vocab={"a": -1}),
    "huge id": changed(model__vocab={"a": 2**40}),
    "empty vocabulary": changed(model__vocab={}, added_tokens=[]),
    "two tokens with one id": changed(model__vocab={"[UNK]": 0, "a": 1, "b": 1}, added_tokens=[]),
    "an added token with an id of the vocabulary": changed(added_tokens=[added("<x>", 4)]),
    "two added tokens with one id": changed(added_tokens=[added("<x>", 10), added("<y>", 10)]),
    "an added id after a gap": changed(added_tokens=[added("<x>", 99)]),
    "added token without id": changed(added_tokens=[{"content": "<x>"}]),
    "added token of a wrong type": changed(added_tokens=[3]),
    "bad regex": changed(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}),
    "bad charsmap": changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "CTC": changed(decoder={"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": True}),
    "strip right at the end": changed(
        decoder={"type": "Sequence", "decoders": [{"type": "Fuse"}, STRIP_ALL]}
    ),
    "regex over the whole text": changed(
        decoder={
            "type": "Sequence",
            "decoders": [{"type": "Fuse"}, {"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""}],
        }
    ),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_damaged_tokenizer_json(case, tmp_path):
    (tmp_path / "tokenizer.json").write_text(BAD_JSON[case], encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json") as caught:
        load_tokenizer_files(tmp_path)
    assert len(str(caught.value)) < 500


def test_tokenizer_json_that_is_not_text_or_not_a_file(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read as text"):
        load_tokenizer_files(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read: it is a folder"):
        load_tokenizer_files(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_pipes_and_huge_files_are_not_read(name, tmp_path):
    if name == "tokenizer_config.json":
        (tmp_path / "tokenizer.model").write_bytes(PROTO)
    with (tmp_path / name).open("wb") as file:
        file.truncate(files.MAX_TOKENIZER_BYTES + 1)  # a sparse file
    with pytest.raises(TokenizerError, match=rf"{name} has [\d,]+ bytes; at most [\d,]+ are allowed"):
        load_tokenizer_files(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(TokenizerError, match=rf"{name} cannot be read: it is a pipe or a device"):
        load_tokenizer_files(tmp_path)


def test_panics_of_the_library_become_our_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text(changed(decoder=STRIP_ALL), encoding="utf-8")
    tokenizer = load_tokenizer_files(tmp_path)
    with pytest.raises(TokenizerError, match="fails on token 4"):  # it strips both ends of one character
        tokenizer.decode([4])
    library = byte_level()
    library.pre_tokenizer = pre_tokenizers.Split(Regex("(x+x+)+y"), "isolated")
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer_files(tmp_path)
    with pytest.raises(TokenizerError, match="fail on this text"):  # the regex exceeds its retry limit
        tokenizer.encode("x" * 40)
    assert tokenizer.encode("hello")


PROTO = train(PIECES["sp_unigram"])
BAD_PIECES = {
    "empty": b"",
    "text": b"hello",
    "zeros": bytes(100),
    "json": b'{"model": 1}',
    "truncated at the end": PROTO[:-3],
    "truncated early": PROTO[:100],
    "a piece that is not text": PROTO.replace("本".encode(), b"\xff\xff\xff"),
    "a piece twice": PROTO + b"\x0a\x0d\x0a\x04same\x15\x00\x00\x00\x00\x18\x01" * 2,
    "a denormalizer": PROTO + b"\x2a\x06\x12\x04abcd",
}


@pytest.mark.parametrize("case", BAD_PIECES)
def test_damaged_tokenizer_model(case, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(BAD_PIECES[case])
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        load_tokenizer_files(tmp_path)


def test_tiktoken_vocabulary_is_recognised(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(TokenizerError, match=r"is a tiktoken vocabulary.*tokenizer\.json"):
        load_tokenizer_files(tmp_path)


BAD_CONFIGS = {
    "list": ("tokenizer_config", []),
    "bos a number": ("tokenizer_config", {"bos_token": 3}),
    "bos a list": ("special_tokens_map", {"bos_token": ["<s>"]}),
    "content a number": ("tokenizer_config", {"bos_token": {"content": 3}}),
    "add_bos a text": ("tokenizer_config", {"add_bos_token": "yes"}),
    "legacy a number": ("tokenizer_config", {"legacy": 1}),
    "bos unknown": ("tokenizer_config", {"add_bos_token": True, "bos_token": "<nowhere>"}),
    "added a list": ("tokenizer_config", {"added_tokens_decoder": ["<x>"]}),
    "added id in words": ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "<x>"}}}),
    "added token a number": ("tokenizer_config", {"added_tokens_decoder": {"400": 3}}),
    "added id of another token": ("tokenizer_config", {"added_tokens_decoder": {"5": {"content": "<x>"}}}),
    "added id a text": ("added_tokens", {"<x>": "400"}),
    "added id true": ("added_tokens", {"<x>": True}),
    "added id huge": ("added_tokens", {"<x>": 2**31}),
    "added id negative": ("added_tokens", {"<x>": -1}),
    "two added tokens with one id": ("added_tokens", {"<x>": 400, "<y>": 400}),
    "one token with two ids": (
        "tokenizer_config",
        {"added_tokens_decoder": {"400": {"content": "<x>"}, "401": {"content": "<x>"}}},
    ),
    "added empty": ("added_tokens", {"": 400}),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_damaged_configuration(case, tmp_path):
    name, content = BAD_CONFIGS[case]
    (tmp_path / "tokenizer.model").write_bytes(PROTO)
    write(tmp_path, **{name: content})
    with pytest.raises(TokenizerError, match=re.escape(str(tmp_path))):
        load_tokenizer_files(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[" * 300_000, '{"a":' * 300_000, "\ufeff{}", "1" * 5000])
def test_configuration_that_is_not_json(text, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(PROTO)
    (tmp_path / "tokenizer_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        load_tokenizer_files(tmp_path)


@pytest.mark.parametrize("name", ["llama", "sp_unigram", "byte_level"])
def test_mutated_files_load_or_raise_our_error(name, folders, tmp_path):
    folder, _ = folders(name)
    (source,) = folder.iterdir()
    data = source.read_bytes()
    rng = random.Random(5)
    failures = 0
    for _ in range(150):
        mutated = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 20])):
            mutated[rng.randrange(len(mutated))] = rng.choice([*b'"09az:,[', rng.randrange(256)])
        end = rng.choice([None, None, None, rng.randrange(len(data))])
        (tmp_path / source.name).write_bytes(mutated[:end])
        try:
            tokenizer = load_tokenizer_files(tmp_path)
            tokenizer.decode(tokenizer.encode("hello 日本</s>"))
            tokenizer.decode(range(500))
        except TokenizerError:
            failures += 1
    assert 50 < failures < 150


def test_neither_transformers_nor_protobuf_is_imported():
    code = (
        "import sys, streamllm.tokenizer\n"
        "print([name for name in ('transformers', 'google.protobuf') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def bomb(part, stages):
    state = json.loads(samples.llama().to_str())
    kinds = {"normalizer": ("Sequence", "normalizers"), "decoder": ("Sequence", "decoders")}
    kind, key = kinds[part]
    state[part] = {"type": kind, key: stages}
    return json.dumps(state)


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
EVERYWHERE = {"type": "Replace", "pattern": {"Regex": ""}, "content": "ab"}


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
@pytest.mark.parametrize(
    "stages", [[REPLACE] * 3, [EVERYWHERE] * 20, [{"type": "Sequence", "normalizers": [REPLACE] * 9}]]
)
def test_rules_that_multiply_the_length_of_a_text_are_refused(part, stages, tmp_path):
    (tmp_path / "tokenizer.json").write_text(bomb(part, stages))
    with pytest.raises(TokenizerError, match=r"times as long"):
        load_tokenizer_files(tmp_path)


def test_a_post_processor_that_repeats_the_text_is_refused(tmp_path):
    state = json.loads(samples.llama().to_str())
    state["post_processor"]["single"] *= 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(TokenizerError, match="more than 100 pieces"):
        load_tokenizer_files(tmp_path)


def test_a_post_processor_that_adds_an_unknown_id_is_refused(tmp_path):
    state = json.loads(samples.llama().to_str())
    state["post_processor"]["special_tokens"]["<s>"]["ids"] = [9999]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(TokenizerError, match="adds id 9999 to every text"):
        load_tokenizer_files(tmp_path)


def test_panics_of_the_library_are_not_printed(tmp_path, capfd):
    changes = ({"vocab": {"a": 4294967295}}, {"vocab": {}, "unk_token": "x"}, {"merges": [["x", "y"]]})
    for number, change in enumerate(changes):
        state = json.loads(samples.llama().to_str())
        state["model"] |= change
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(state))
        with contextlib.suppress(TokenizerError):
            load_tokenizer_files(folder)
    assert "panicked" not in capfd.readouterr().err


def test_stages_cannot_hide_behind_escapes(tmp_path):
    text = bomb("normalizer", [REPLACE] * 3).replace('"normalizer"', '"normali\\u007aer"')
    assert "normalizer" in json.loads(text)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match="escaped letters"):
        load_tokenizer_files(tmp_path)
