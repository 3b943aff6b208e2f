"""Tokens that the files beside tokenizer.json name, compared with transformers."""

import json

import pytest
from tokenizers import Tokenizer

from streamllm.tokenizer import TokenizerError, load_tokenizer_files
from tests.unit.tokenizer import samples
from tests.unit.tokenizer.samples import write

TEXTS = ["hello<|x|>world", " <|x|> <|y|>hello", "<|x|><|y|>", "hello </s>world", "<|x|>  hello", "a<|x|>b"]


def entry(content, **flags):
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False}
    return {"content": content, **plain, **flags}


SIZE = samples.byte_level().get_vocab_size()
CASES = {
    "decoder": {"tokenizer_config": {"added_tokens_decoder": {str(SIZE): entry("<|x|>", special=True)}}},
    "decoder, not special": {"tokenizer_config": {"added_tokens_decoder": {str(SIZE): entry("<|x|>")}}},
    "decoder with flags": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                str(SIZE): entry("<|x|>", special=True, rstrip=True),
                str(SIZE + 1): entry("<|y|>", lstrip=True, normalized=True),
            }
        }
    },
    "decoder changes a flag": {
        "tokenizer_config": {"added_tokens_decoder": {"0": entry("</s>", special=True, rstrip=True)}}
    },
    "decoder makes it ordinary": {
        "tokenizer_config": {"added_tokens_decoder": {str(SIZE - 3): entry("<x>", special=True)}}
    },
    "added_tokens.json": {"added_tokens": {"<|x|>": SIZE}},
    "added_tokens.json, named": {
        "added_tokens": {"<|y|>": SIZE, "<|x|>": SIZE + 1},
        "special_tokens_map": {"eos_token": "<|x|>"},
    },
    "added_tokens.json, extra": {
        "added_tokens": {"<|y|>": SIZE, "<|x|>": SIZE + 1},
        "tokenizer_config": {
            "additional_special_tokens": ["<|x|>"]
        },  # transformers 5 ignores those of the map
    },
    "map alone": {"special_tokens_map": {"eos_token": entry("<|x|>", rstrip=True), "pad_token": "<|y|>"}},
    "config alone": {"tokenizer_config": {"eos_token": "<|x|>", "additional_special_tokens": ["<|y|>"]}},
    "named token of the vocabulary": {"tokenizer_config": {"eos_token": "hello"}},
    "named token that is not special": {"tokenizer_config": {"eos_token": "<x>"}},
    "model's own name": {"tokenizer_config": {"image_token": "<|x|>"}},
    "extra tokens by name": {"tokenizer_config": {"extra_special_tokens": {"image_token": "<|x|>"}}},
}


@pytest.mark.parametrize("name", CASES)
def test_text_has_the_ids_that_transformers_gives_it(name, tmp_path):
    from transformers import AutoTokenizer

    samples.byte_level().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, **{"tokenizer_config": {}, **CASES[name]})
    ours, theirs = load_tokenizer_files(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    for token in range(len(theirs)):
        assert ours.decode([token]) == theirs.decode([token], skip_special_tokens=True)


def test_tokenizer_json_and_tokenizer_model_read_the_same_companions(folders, tmp_path):
    for name in ("llama", "sp_plain"):
        file = "tokenizer.model" if name == "sp_plain" else "tokenizer.json"
        folder, library = folders(name)
        size = library.get_vocab_size() if name == "llama" else library.vocab_size()
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes((folder / file).read_bytes())
        write(tmp_path / name, added_tokens={"<|x|>": size}, special_tokens_map={"pad_token": "<|x|>"})
        tokenizer = load_tokenizer_files(tmp_path / name)
        assert size in tokenizer.encode("a<|x|>")
        assert tokenizer.decode([size]) == ""
        assert tokenizer.special_tokens["pad_token"] == "<|x|>"


def test_an_id_that_tokenizer_json_contradicts_is_refused(tmp_path):
    samples.byte_level().save(str(tmp_path / "tokenizer.json"))
    for index in (5, SIZE + 7):
        write(tmp_path, tokenizer_config={"added_tokens_decoder": {str(index): entry("<|x|>")}})
        with pytest.raises(TokenizerError, match=f"has id {index} in .* must give it the same id"):
            load_tokenizer_files(tmp_path)


def test_special_tokens_that_are_normalized_are_not_printed(tmp_path):
    """tokenizers names them "▁<s>" where the normaliser prepends a space."""
    state = json.loads(samples.llama().to_str())
    for token in state["added_tokens"]:
        token["normalized"] = True
    library = Tokenizer.from_str(json.dumps(state))
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer_files(tmp_path)
    hello = tokenizer.token_to_id("\u2581hello")
    assert tokenizer.decode([1, hello, 2]) == "hello"
    assert tokenizer.decode([1, hello, 2], skip_special_tokens=False) == "<s> hello</s>"
    decoder = tokenizer.decoder()
    assert [decoder.push(token) for token in (1, hello, 2, hello)] == ["", "hello", "", " hello"]


@pytest.mark.parametrize("legacy", [None, True, False])
def test_without_a_prefix_space_no_space_is_lost(legacy, folders, tmp_path):
    folder, _ = folders("sp_plain")
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    write(tmp_path, tokenizer_config={"legacy": legacy, "add_prefix_space": False})
    tokenizer = load_tokenizer_files(tmp_path)
    for text in ("hello", " hello", "  hello", "</s> hello", ""):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False).removeprefix("<s>") == text


def test_flags_that_transformers_5_ignores_are_listed(tmp_path):
    """DeepSeek-V3 and Phi-3 ask for BOS beside a tokenizer.json that does not add it."""
    samples.byte_level().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_config={"bos_token": "<s>", "add_bos_token": True, "add_eos_token": False})
    tokenizer = load_tokenizer_files(tmp_path)
    assert tokenizer.ignored_flags == ("add_bos_token",)
    hello = tokenizer.encode("hello")
    tokenizer.adds_bos = True
    assert tokenizer.encode("hello") == [tokenizer.bos_token_id, *hello]
