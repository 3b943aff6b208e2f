"""tokenizer.json, compared with the tokenizers library."""

import random

import pytest

from streamllm.tokenizer import load_tokenizer_files
from tests.unit.tokenizer.samples import FAMILY, JSON, TEXTS, byte_level, has_mixed_bytes, random_ids, write


@pytest.mark.parametrize("make", JSON, ids=lambda make: make.__name__)
def test_text_is_encoded_as_the_library_does(make, folders):
    folder, library = folders(make.__name__)
    tokenizer = load_tokenizer_files(folder)
    for text in TEXTS:
        for special in (True, False):
            expected = library.encode(text, add_special_tokens=special).ids
            assert tokenizer.encode(text, add_special_tokens=special) == expected


@pytest.mark.parametrize("make", JSON, ids=lambda make: make.__name__)
def test_any_ids_are_decoded_as_the_library_does(make, folders):
    folder, library = folders(make.__name__)
    tokenizer = load_tokenizer_files(folder)
    assert tokenizer.vocab_size == max(library.get_vocab().values()) + 1
    rng = random.Random(1)
    names = [
        "</s>",
        "<s>",
        "<x>",
        "\u2581",
        "\u2581\u2581",
        "<0x41>",
        "<0x20>",
        "é é",
        "日本é",
        "[SEP]",
        "##s",
    ]
    favourites = [index for name in names if (index := library.token_to_id(name)) is not None]
    for _ in range(1500):
        ids = random_ids(rng, tokenizer.vocab_size + 2, favourites, rng.randrange(14))
        for skip in (True, False):
            if not has_mixed_bytes(library, ids, skip):
                expected = library.decode(ids, skip_special_tokens=skip)
                assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_each_byte_that_is_not_utf8_becomes_one_replacement_character(name, folders):
    folder, library = folders(name)
    tokenizer = load_tokenizer_files(folder)

    def ids(*values):
        return [library.token_to_id(f"<0x{value:02X}>") for value in values]

    assert tokenizer.decode(ids(*FAMILY.encode())) == FAMILY
    assert tokenizer.decode(ids(0xE6, 0x9C)) == "\ufffd\ufffd" == library.decode(ids(0xE6, 0x9C))
    assert tokenizer.decode(ids(0xE6, 0x9C, 0xAC, 0xFF, 0x41)) == "本\ufffdA"
    surrogate = ids(0xED, 0xA0, 0x80)  # half of a surrogate pair, encoded as if it were a character
    assert tokenizer.decode(surrogate) == "\ufffd" * 3
    hello = [library.token_to_id("hello")]
    assert tokenizer.decode(ids(0xE6) + hello + ids(0x9C)) == "\ufffdhello\ufffd"


def test_only_the_post_processor_decides_about_bos(folders, tmp_path):
    folder, library = folders("llama")
    library.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_config={"add_bos_token": False, "add_eos_token": True, "bos_token": "<s>"})
    tokenizer = load_tokenizer_files(tmp_path)
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("hello") == [1, library.token_to_id("\u2581hello")]
    assert tokenizer.encode("hello", add_special_tokens=False) == [library.token_to_id("\u2581hello")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, None)
    assert load_tokenizer_files(folder).bos_token_id is None


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path):
    library = byte_level()
    expected = library.encode("hello world, hello").ids
    library.enable_truncation(3)
    library.enable_padding(length=64)
    library.save(str(tmp_path / "tokenizer.json"))
    assert library.encode("hello world, hello").ids != expected
    assert load_tokenizer_files(tmp_path).encode("hello world, hello") == expected


def test_result_equals_transformers_on_the_same_file(folders):
    from transformers import PreTrainedTokenizerFast

    for name in ("byte_level", "llama"):
        folder, _ = folders(name)
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        ours = load_tokenizer_files(folder)
        for text in TEXTS:
            ids = ours.encode(text)
            assert ids == theirs(text)["input_ids"]
            for skip in (True, False):
                expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert ours.decode(ids, skip_special_tokens=skip) == expected
