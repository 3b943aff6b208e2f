"""tokenizer.model, compared with the sentencepiece library; and the files beside it."""

import random
import re

import pytest

from streamllm.tokenizer import TOKENIZER_FILES, load_tokenizer_files
from tests.unit.tokenizer.samples import PIECES, TEXTS, random_ids, write


@pytest.mark.parametrize("name", PIECES)
def test_text_is_encoded_as_sentencepiece_does(name, folders):
    folder, library = folders(name)
    tokenizer = load_tokenizer_files(folder)
    bos = [library.bos_id()] if library.bos_id() >= 0 else []
    for text in TEXTS:
        if not re.search("<s>|</s>", text):
            assert tokenizer.encode(text, add_special_tokens=False) == library.encode(text)
            assert tokenizer.encode(text) == bos + library.encode(text)


@pytest.mark.parametrize("name", PIECES)
def test_any_ids_are_decoded_as_sentencepiece_does(name, folders):
    folder, library = folders(name)
    tokenizer = load_tokenizer_files(folder)
    assert tokenizer.vocab_size == library.vocab_size()
    rng = random.Random(2)
    names = [
        "\u2581",
        "\u2581\u2581",
        "<s>",
        "</s>",
        "<unk>",
        "<0x20>",
        "<0xE6>",
        "<0x9C>",
        "<0xAC>",
        "<ctl>",
    ]
    favourites = [library.piece_to_id(name) for name in names]
    for _ in range(1500):
        ids = random_ids(rng, library.vocab_size(), favourites, rng.randrange(14))
        assert tokenizer.decode(ids) == library.decode(ids)


def test_text_is_split_at_special_tokens_first(folders):
    folder, library = folders("sp_plain")
    tokenizer = load_tokenizer_files(folder)
    assert 2 not in library.encode("a</s>b")
    expected = [*library.encode("a"), 2, *library.encode(" b"), 1, 0, *library.encode("c")]
    assert tokenizer.encode("a</s> b<s><unk>c", add_special_tokens=False) == expected
    # Without a configuration, <unk> is not special and decodes as sentencepiece decodes it.
    assert tokenizer.decode(expected) == "a  b \u2047  c"
    assert tokenizer.decode(expected, skip_special_tokens=False) == "a</s>  b<s> \u2047  c"
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def copy_of(folders, name, tmp_path, **files):
    folder, library = folders(name)
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    write(tmp_path, **files)
    return load_tokenizer_files(tmp_path), library


def test_added_tokens_in_old_and_new_files(folders, tmp_path):
    size = folders("sp_plain")[1].vocab_size()
    added = {"<pad>": size, "<|user|>": size + 1, "<|user|>x": size + 4}
    named = {
        "pad_token": "<pad>",
        "unk_token": {"content": "<unk>"},
        "additional_special_tokens": ["<|user|>"],
    }
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old, library = copy_of(
        folders,
        "sp_plain",
        tmp_path / "old",
        added_tokens=added,
        special_tokens_map=named,
        tokenizer_config={},
    )
    decoder = {
        str(index): {"content": content, "special": content in ("<pad>", "<|user|>")}
        for content, index in added.items()
    }
    config = named | {"added_tokens_decoder": decoder}
    new, _ = copy_of(
        folders,
        "sp_plain",
        tmp_path / "new",
        tokenizer_config=config,
        special_tokens_map={"pad_token": "<stale>"},
        added_tokens={"<stale>": 9999},
    )
    for tokenizer in (old, new):
        assert tokenizer.vocab_size == size + 5
        assert tokenizer.special_tokens["pad_token"] == "<pad>"
        ids = tokenizer.encode("a<|user|>x<|user|> b<unk><pad>")
        # Of two tokens that begin at the same place, the longer one is found.
        assert ids == [1, *library.encode("a"), size + 4, size + 1, *library.encode(" b"), 0, size]
        assert tokenizer.decode(ids) == "a<|user|>x  b"  # only special tokens are skipped, <unk> among them
        assert tokenizer.decode(ids, skip_special_tokens=False) == "<s> a<|user|>x<|user|>  b<unk><pad>"
        unused = [size + 2, size + 3, size + 5, 10**12]
        assert tokenizer.decode(unused) == ""


def test_added_tokens_include_white_space_if_configured(folders, tmp_path):
    size = folders("sp_plain")[1].vocab_size()
    decoder = {
        str(size): {"content": "<l>", "lstrip": True},
        str(size + 1): {"content": "<r>", "rstrip": True},
        str(size + 2): {"content": "word", "single_word": True},
    }
    tokenizer, library = copy_of(
        folders,
        "sp_plain",
        tmp_path,
        tokenizer_config={"added_tokens_decoder": decoder, "add_bos_token": False},
    )
    assert tokenizer.encode("a \n<l> b") == [*library.encode("a"), size, *library.encode(" b")]
    assert tokenizer.encode("a <r> \n b") == [*library.encode("a "), size + 1, *library.encode("b")]
    assert tokenizer.encode("a <r> ") == [*library.encode("a "), size + 1]
    assert tokenizer.encode("word sword") == [size + 2, *library.encode(" sword")]


@pytest.mark.parametrize(
    ("config", "before", "after"),
    [
        ({}, [1], []),
        ({"add_bos_token": None}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"add_bos_token": True, "bos_token": "</s>"}, [2], []),
        ({"bos_token": ""}, [1], []),
    ],
)
def test_configuration_decides_about_bos_and_eos(config, before, after, folders, tmp_path):
    tokenizer, library = copy_of(folders, "sp_plain", tmp_path, tokenizer_config=config)
    for text in ("", "hello"):
        assert tokenizer.encode(text) == before + library.encode(text) + after
        assert tokenizer.encode(text, add_special_tokens=False) == library.encode(text)


def test_prefix_space_of_later_segments(folders, tmp_path):
    """With `legacy` false, only the start of the text gets the prefix space."""
    for name in ("every", "first", "none"):
        (tmp_path / name).mkdir()
    every, library = copy_of(folders, "sp_plain", tmp_path / "every", tokenizer_config={"legacy": True})
    first, _ = copy_of(folders, "sp_plain", tmp_path / "first", tokenizer_config={"legacy": False})
    none, _ = copy_of(
        folders, "sp_plain", tmp_path / "none", tokenizer_config={"legacy": False, "add_prefix_space": False}
    )
    prefixed = library.encode("b")
    bare = library.encode("b", out_type=str)
    assert bare[0].startswith("\u2581")
    bare = [library.piece_to_id("b")]
    assert every.encode("b</s>b") == [1, *prefixed, 2, *prefixed]
    assert first.encode("b</s>b") == [1, *prefixed, 2, *bare]
    assert first.encode("</s>b") == [1, 2, *bare]
    assert none.encode("b</s>b") == [1, *bare, 2, *bare]
    assert every.decode(every.encode("b</s>b")) == "b b"
    assert first.decode(first.encode("b</s>b")) == "bb"


def test_tokenizer_json_is_preferred(folders, tmp_path):
    tokenizer, _ = copy_of(folders, "sp_plain", tmp_path)
    assert "tokenizer.model" in repr(tokenizer)
    folders("byte_level")[1].save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_config={"eos_token": {"content": "</s>", "lstrip": False}})
    tokenizer = load_tokenizer_files(tmp_path)
    assert repr(tokenizer) == f"Tokenizer(tokenizer.json, {tokenizer.vocab_size} ids, eos '</s>')"
    assert set(TOKENIZER_FILES) >= {path.name for path in tmp_path.iterdir()}
